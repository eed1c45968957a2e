//! Which engine runs the guest.

use crate::wire::EngineChoice;
use cpu_soft::SoftHypervisor;
use hypervisor::Hypervisor;
use std::sync::Arc;

/// The engine of `choice`. `auto` takes the fastest that works on this host.
pub fn engine(choice: EngineChoice) -> Box<dyn Hypervisor> {
    match choice {
        // The software engine is the only one so far.
        EngineChoice::Auto | EngineChoice::Soft => Box::new(SoftHypervisor::interpreter()),
        EngineChoice::SoftTranslate => {
            Box::new(SoftHypervisor::translating(Arc::new(cpu_translate::Factory::default())))
        }
    }
}
