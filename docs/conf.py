"""How Sphinx makes a site of these pages: ``python3 dev.py docs``. Nothing is fetched, neither here nor by a reader."""

from pathlib import Path

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

import temporal_layers
from temporal_layers.recipes.cli import COMMANDS

project = "temporal_layers"
copyright = "the temporal_layers contributors"
version = release = temporal_layers.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
nitpicky = True  # a role in a docstring that leads nowhere is a warning, and warnings are errors
nitpick_ignore_regex = [(r"py:.*", r"(collections|diffusers|enum|numpy|pathlib|PIL|torch|typing)\..*")]  # others' names
nitpick_ignore = [("py:class", "temporal_layers.recipes.data.sampling.Bucket")]  # an alias of a tuple

myst_heading_anchors = 4  # links to headings work here as on a forge

# Docstrings are in Google's style; types stand in the signature once.
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"temporal_layers {release}"
html_static_path = ["_static"]
html_css_files = ["figures.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
pygments_style, pygments_dark_style = "friendly", "github-dark"


class InlineFigures(SphinxPostTransform):
    """Puts drawings into the page itself, where they take on the colours of the theme; as images they could not."""

    default_priority = 5
    formats = ("html",)

    def run(self, **options):
        for image in list(self.document.findall(nodes.image)):
            if image["uri"].endswith(".svg"):
                drawing = Path(self.app.srcdir, image["uri"]).read_text(encoding="utf-8")
                image.replace_self(nodes.raw("", f'<div class="drawing">{drawing}</div>', format="html"))


class Commands(SphinxDirective):
    """A table of the commands of ``temporal-layers``."""

    def run(self):
        rows = [f"| `{name}` | {purpose} |" for name, (_, purpose) in COMMANDS.items()]
        return self.parse_text_to_nodes("\n".join(["| command | |", "|---|---|", *rows]))


def keep_sentence(app, what, name, value, options, lines):
    """Keeps napoleon from taking the words in front of a colon in a property's first line for its type."""
    if what == "property":
        lines[:0] = ["..", ""]  # an empty comment


def setup(app):
    app.add_post_transform(InlineFigures)
    app.add_directive("commands", Commands)
    app.connect("autodoc-process-docstring", keep_sentence, priority=400)  # napoleon's is 500
