"""Import of published sets, and export of our sets to other formats."""

from condense.exchange.export import FORMATS as FORMATS
from condense.exchange.export import check_export as check_export
from condense.exchange.export import clipping as clipping
from condense.exchange.export import export as export
from condense.exchange.published import LAYOUTS as LAYOUTS
from condense.exchange.published import External as External
from condense.exchange.published import as_set as as_set
from condense.exchange.published import is_foreign as is_foreign
from condense.exchange.published import read as read
