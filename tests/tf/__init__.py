"""What only the TensorFlow backend promises. All of it is skipped where that is not under test."""

from tests.helpers.frameworks import needs

needs("tf")
