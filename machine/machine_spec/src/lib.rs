//! The machine that is to be built, as plain structs, and the board's address map.
//!
//! Called by `machine` (which builds what stands here), `firmware` (which describes it to the
//! guest) and `vmm` (which fills it from wire types). Nothing here knows an engine, a device or a
//! wire format; a spec that passed [`MachineSpec::validate`] can be built on every engine.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod layout;
