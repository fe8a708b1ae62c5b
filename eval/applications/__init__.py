"""What a synthetic set is used for, measured: continual learning, architecture search, privacy; and
what its images alone are worth.

Each application is a frozen value of its choices whose ``run`` takes a set and its data and returns numbers for a table
and a file.
"""

from condense.eval.applications.application import Application as Application
from condense.eval.applications.application import Setting as Setting
from condense.eval.applications.continual import Continual
from condense.eval.applications.nas import NAS
from condense.eval.applications.privacy import Privacy
from condense.eval.applications.ranking import Ranking

APPLICATIONS: dict[str, type[Application]] = {
    "continual": Continual,
    "nas": NAS,
    "privacy": Privacy,
    "ranking": Ranking,
}
