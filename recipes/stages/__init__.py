"""The training stages of the Video LDM, one file each; `temporal-layers train STAGE` runs one."""
