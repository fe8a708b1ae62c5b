"""Applications of a synthetic set: continual learning, architecture search, privacy, linear probes of frozen networks,
transfer, and the scores of DD-Ranking.

Each application is a frozen dataclass of its settings. Its ``run`` takes a set with its data and returns a table and
the numbers for a file. ``pruning`` measures selections of real images; it takes data and no set, and has a command of
its own.
"""

from condense.eval.applications.application import Application as Application
from condense.eval.applications.application import Findings as Findings
from condense.eval.applications.application import Setting as Setting
from condense.eval.applications.continual import Continual
from condense.eval.applications.nas import NAS
from condense.eval.applications.privacy import Privacy
from condense.eval.applications.probe import Probe
from condense.eval.applications.ranking import Ranking
from condense.eval.applications.transfer import Transfer
from condense.names import suggest

APPLICATIONS: dict[str, type[Application]] = {
    "continual": Continual,
    "nas": NAS,
    "privacy": Privacy,
    "probe": Probe,
    "ranking": Ranking,
    "transfer": Transfer,
}


def name_and_application(application: str | Application) -> tuple[str, Application]:
    """Return an application, given by name or as an instance, with the name for its file.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(application, str):
        if application not in APPLICATIONS:
            raise ValueError(f"unknown application {application!r}: {suggest(application, APPLICATIONS)}")
        return application, APPLICATIONS[application]()
    listed = (name for name, kind in APPLICATIONS.items() if kind is type(application))
    return next(listed, type(application).__name__), application
