"""Every transformer and UNet class of diffusers as a tiny random model, and what it is called with.

`CASES` maps a class name, with a variant in brackets where one class has two attentions, to a case.
"""

from . import audio, image, image_streams, multimodal, unets, video
from .case import Case

CASES: dict[str, Case] = {
    **image.CASES,
    **image_streams.CASES,
    **video.CASES,
    **multimodal.CASES,
    **audio.CASES,
    **unets.CASES,
}

EXCLUDED: dict[str, str] = {
    "MotionAdapter": "a container of weights for UNetMotionModel: its forward computes nothing",
}
