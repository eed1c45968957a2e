//! Device traits, buses and interrupt lines.
