//! What user mode cannot show: gates by mode, save areas, exceptions of both units. Arithmetic is compared
//! with the host processor in `tests/differential`.

mod exceptions;
pub(crate) mod flat;
mod gates;
mod save_areas;
mod x87_waiting;
