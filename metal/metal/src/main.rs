//! `bedplate-metal`: the image that boots without an operating system underneath. What it does is the library's; here
//! are the entry, the heap and the panic handler, which only exist there.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod image {
    use metal::heap::Heap;

    core::arch::global_asm!(include_str!("arch/boot.s"));

    #[global_allocator]
    static HEAP: Heap = Heap::new();

    /// From `boot.s`: the first 4 GiB are mapped one to one, interrupts are off.
    #[unsafe(no_mangle)]
    extern "C" fn metal_start(start_info: u64) -> ! {
        metal::start(start_info, &HEAP)
    }

    #[panic_handler]
    fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
        metal::panic::report(info)
    }
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!(
        "bedplate-metal runs without an operating system: `cargo xtask metal run` boots it in an emulator"
    );
    std::process::exit(2);
}
