//! The machine that is to be built, as plain structs, and the board's address map.
//!
//! Called by `machine` (which builds what stands here), `firmware` (which describes it to the
//! guest) and `vmm` (which fills it from wire types). Nothing here knows an engine, a device or a
//! wire format; a spec that passed [`MachineSpec::validate`] can be built on every engine.
//!
//! - [`spec`](MachineSpec): what a machine is made of.
//! - `validate`: limits and duplicates, with errors that name the field.
//! - `saved`: the spec as it stands in save files and migration streams.
//! - [`layout`]: addresses, ports, interrupts, E820.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod identity;
pub mod layout;
mod saved;
mod spec;
mod validate;

pub use identity::{Mac, ParseIdentityError, Uuid};
pub use spec::{
    BlkSpec, BootSpec, ClockRate, ClockSpec, ConsoleSpec, CpuFeature, CpuSpec, DeviceSpec, HostKey,
    MachineSpec, MissedTicks, NetSpec, PciSlot, RamBacking, RamSpec, RngSpec, UartSpec,
};
pub use validate::{Problem, SpecError, limit};
