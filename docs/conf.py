"""The documentation site: `make site` writes docs/_build/site, which works from disk, without a network.

The chapters are the pages of this folder; the reference is written anew from the docstrings at every build (reference.py),
and the tutorials are run by myst-nb, whose cache keeps what has not changed.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "pellucid"
author = "the developers of pellucid"
release = metadata.version("pellucid")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "reference"]
exclude_patterns = ["_build", "conf.py", "reference.py"]
suppress_warnings = ["myst.header", "misc.highlighting_failure"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

default_role = "literal"
autodoc_typehints = "none"  # the signature has them
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
add_module_names = False
python_display_short_literal_types = True
python_use_unqualified_type_names = True

html_theme = "pydata_sphinx_theme"
html_title = "pellucid"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_sidebars = {"index": []}
html_copy_source = False
html_show_sourcelink = False
html_permalinks_icon = "#"
html_theme_options = {
    "logo": {"text": "pellucid"},
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "navbar_persistent": ["search-button"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copyright = f"{author}, Apache-2.0"
