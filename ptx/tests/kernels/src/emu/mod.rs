//! Stands for the emulator: the device build leaves it out.
