"""Studies: a question put to many mechanisms at once. Each is one module or folder, found by scanning this folder."""

from __future__ import annotations

from regard.studies.framework.catalogue import get_study, list_studies
from regard.studies.framework.protocol import Chosen, Study, opened
from regard.workbench.reports.sections import Curves, Heat, Picture, Points, Section

__all__ = ["Chosen", "Curves", "Heat", "Picture", "Points", "Section", "Study", "get_study", "list_studies", "opened"]
