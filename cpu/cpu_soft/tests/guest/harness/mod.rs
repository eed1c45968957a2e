//! A machine for one test: RAM, clock, recorded I/O and vCPUs of the `soft` engine behind the public traits.
//!
//! [`Guest`] has one vCPU that runs in the test's own thread; [`smp`] has several in threads of their own.
//! Programs stop with HLT. Unless a test says otherwise every exception and interrupt vector leads to a stub
//! that halts, so that a test sees the vector, the error code and the frame.
//!
//! Map: [`layout`]. Descriptors and page tables: [`images`].

pub mod apic;
pub mod guest;
pub mod images;
pub mod io;
pub mod layout;
pub mod random;
pub mod smp;
pub mod watchdog;

pub use guest::{Frame, Guest, Stop};
pub use images::{Tables, descriptor, gate64, segment};
pub use io::Recorder;
pub use layout::*;
pub use random::Random;

use cpu_soft::SoftHypervisor;
use iced_x86::code_asm::CodeAssembler;

/// Assembles instructions: `asm!(a; mov(rax, 1u64); hlt();)`.
#[macro_export]
macro_rules! asm {
    ($a:ident; $($ins:ident($($arg:expr),*);)*) => {{ $( $a.$ins($($arg),*).unwrap(); )* }};
}

/// The engine under test. `cpu_translate` builds this file, too: there everything is translated the first time it
/// runs.
pub fn engine() -> SoftHypervisor {
    match env!("CARGO_PKG_NAME") {
        "cpu_translate" => translator(),
        _ => SoftHypervisor::interpreter(),
    }
}

/// Everything is translated the first time it runs.
pub fn translator() -> SoftHypervisor {
    SoftHypervisor::translating(std::sync::Arc::new(cpu_translate::Factory { threshold: 0 }))
}

/// Machine code of what `f` assembles for `ip`.
pub fn assemble(bitness: u32, ip: u64, f: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(bitness).unwrap();
    f(&mut a);
    a.assemble(ip).unwrap()
}
