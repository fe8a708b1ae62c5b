"""What a synthetic set is used for, measured: continual learning, architecture search, privacy; and
what its images alone are worth.

Each application is a frozen value of its choices whose ``run`` takes a set and its data and returns numbers for a table
and a file.
"""

from condense.eval.applications.application import Application as Application
from condense.eval.applications.application import Findings as Findings
from condense.eval.applications.application import Setting as Setting
from condense.eval.applications.continual import Continual
from condense.eval.applications.nas import NAS
from condense.eval.applications.privacy import Privacy
from condense.eval.applications.ranking import Ranking
from condense.names import suggest

APPLICATIONS: dict[str, type[Application]] = {
    "continual": Continual,
    "nas": NAS,
    "privacy": Privacy,
    "ranking": Ranking,
}


def name_and_application(application: str | Application) -> tuple[str, Application]:
    """An application by its name, or by its value; and the name that its file carries.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(application, str):
        if application not in APPLICATIONS:
            raise ValueError(f"unknown application {application!r}: {suggest(application, APPLICATIONS)}")
        return application, APPLICATIONS[application]()
    listed = (name for name, kind in APPLICATIONS.items() if kind is type(application))
    return next(listed, type(application).__name__), application
