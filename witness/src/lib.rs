//! Witness that the machine needs no operating system: this library has its own panic handler, so that
//! the build fails ("found duplicate lang item `panic_impl`") as soon as one of the crates below links std.
#![no_std]

use core::alloc::{GlobalAlloc, Layout};

macro_rules! witnesses {
    ($($name:ident)*) => { $(extern crate $name as _;)* };
}
witnesses! {
    apic chipset cpu_hardware cpu_soft cpu_svm cpu_vmx device firmware guest_memory guest_time hypervisor machine
    machine_spec metal pci saved_state sync ucs2 uefi_loader virtio virtio_devices x86_decode x86_defs x86_emulate x86_host_ops
}

/// No memory: nothing here runs.
struct NoMemory;

// SAFETY: it never hands out memory.
unsafe impl GlobalAlloc for NoMemory {
    unsafe fn alloc(&self, _: Layout) -> *mut u8 {
        core::ptr::null_mut()
    }
    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static MEMORY: NoMemory = NoMemory;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
