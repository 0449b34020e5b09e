"""Fixtures of `qat`'s tests that serve here too: miniature corpora and networks."""

from tests.qat.campaign.conftest import small as small
from tests.qat.conftest import cache as cache
from tests.qat.conftest import corpus as corpus
from tests.qat.conftest import experiment as experiment
from tests.qat.conftest import one_thread as one_thread
from tests.qat.conftest import rhemo as rhemo
from tests.qat.conftest import tiny_training as tiny_training
