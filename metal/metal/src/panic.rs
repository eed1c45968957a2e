//! The end: a panic or a fault of the hypervisor itself. What happened, with a backtrace, on the serial line and on a
//! text screen if there is one; then the processor stops.
//!
//! Called by: `main.rs`'s panic handler, the exception handlers in [`crate::arch::interrupts`].

use crate::arch::{self, image, lapic, processors, screen};
use crate::log::last_words;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicUsize, Ordering};

const MAX_FRAMES: usize = 32;

/// The processor that reports, plus one; 0: none.
static REPORTING: AtomicUsize = AtomicUsize::new(0);

/// A panic.
pub fn report(info: &PanicInfo<'_>) -> ! {
    stop_if_again();
    screen::show(format_args!("bedplate-metal: {info}"));
    last_words(format_args!("\nPANIC: {info}"));
    backtrace(arch::frame_pointer());
    end()
}

/// An exception of the hypervisor's own code.
pub fn fault(text: core::fmt::Arguments<'_>, frame_pointer: u64) -> ! {
    stop_if_again();
    screen::show(format_args!("bedplate-metal: {text}"));
    last_words(format_args!("\nPANIC: {text}"));
    backtrace(frame_pointer);
    end()
}

/// What cannot be booted with, said clearly; then the processor stops.
pub fn refuse(text: core::fmt::Arguments<'_>) -> ! {
    screen::show(format_args!("bedplate-metal: {text}"));
    last_words(format_args!("REFUSED: {text}"));
    end()
}

/// Reporting may fault itself, and one processor reports.
fn stop_if_again() {
    arch::disable_interrupts();
    // As long as there is one processor it may not know its number yet.
    let mine = if processors::running() > 1 { processors::number() + 1 } else { 1 };
    match REPORTING.compare_exchange(0, mine, Ordering::SeqCst, Ordering::SeqCst) {
        Ok(_) => lapic::stop_others(),
        Err(other) if other != mine => arch::stop(),
        Err(_) => {
            last_words(format_args!("\nPANIC while one is reported"));
            end()
        }
    }
}

/// Return addresses along the frame pointers, as far as they stay on a stack of the image.
fn backtrace(mut frame: u64) {
    for _ in 0..MAX_FRAMES {
        let Some((next, address)) = image::stack_frame(frame) else { break };
        last_words(format_args!("  at {address:#x}"));
        if next <= frame {
            break;
        }
        frame = next;
    }
}

fn end() -> ! {
    last_words(format_args!("HALTED"));
    arch::power_off(false)
}
