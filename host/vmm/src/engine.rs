//! Which engine runs the guest.

use crate::wire::EngineChoice;
use hypervisor::Hypervisor;

/// The engine of `choice`. `auto` takes the fastest that works on this host.
pub fn engine(choice: EngineChoice) -> Box<dyn Hypervisor> {
    match choice {
        // The software engine is the only one so far.
        EngineChoice::Auto | EngineChoice::Soft => Box::new(cpu_soft::SoftHypervisor),
    }
}
