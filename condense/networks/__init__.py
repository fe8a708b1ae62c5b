"""Networks by name and as pure functions of their weights."""

from condense.data.layout import InputShape as InputShape
from condense.networks.base import Network as Network
from condense.networks.external import Factory as Factory
from condense.networks.functional import Captured as Captured
from condense.networks.functional import Functional as Functional
from condense.networks.functional import Weights as Weights
from condense.networks.functional import without_projector as without_projector
from condense.networks.registry import NetworkSpec as NetworkSpec
from condense.networks.registry import build as build
from condense.networks.registry import default_for as default_for
from condense.networks.registry import describe as describe
from condense.networks.registry import names as names
from condense.networks.registry import parse as parse
from condense.networks.registry import resolve as resolve
from condense.networks.registry import with_options as with_options
