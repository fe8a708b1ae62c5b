"""Synthetic sets: latents, decoders, labels and the file format."""

from condense.synthetic.budget import Cost as Cost
from condense.synthetic.decode import DCT as DCT
from condense.synthetic.decode import DECODERS as DECODERS
from condense.synthetic.decode import Bases as Bases
from condense.synthetic.decode import Decode as Decode
from condense.synthetic.decode import Factor as Factor
from condense.synthetic.decode import Hallucinator as Hallucinator
from condense.synthetic.decode import Pixels as Pixels
from condense.synthetic.decode import Pixels8Bit as Pixels8Bit
from condense.synthetic.decode import Pyramid as Pyramid
from condense.synthetic.decode import Siren as Siren
from condense.synthetic.decode import StaticDynamic as StaticDynamic
from condense.synthetic.files import load as load
from condense.synthetic.files import save as save
from condense.synthetic.labels import LABELS as LABELS
from condense.synthetic.labels import Hard as Hard
from condense.synthetic.labels import Labels as Labels
from condense.synthetic.labels import Logits as Logits
from condense.synthetic.labels import Targets as Targets
from condense.synthetic.labels import Teacher as Teacher
from condense.synthetic.set import Origin as Origin
from condense.synthetic.set import SyntheticSet as SyntheticSet
from condense.synthetic.teaching import Online as Online
from condense.synthetic.teaching import Projector as Projector
from condense.synthetic.teaching import Stored as Stored
from condense.synthetic.teaching import ViewLabels as ViewLabels
