//! `bedplate-exit-bench`: a guest that tells what its exits cost, in ticks of the time-stamp counter. Where the emulator
//! counts instructions (QEMU's `-icount shift=0`) and the guest's counter is the processor's, a tick is an instruction.
//!
//! Booted by PVH as a guest of `bedplate-metal`, with one virtio disk; `cargo xtask metal test` compares what it says with
//! what was pinned. Of each operation the cheapest of many counts: no timer came between.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
#[path = "exit_bench/x87.rs"]
mod x87;

#[cfg(target_os = "none")]
mod guest {
    use crate::x87;
    use core::sync::atomic::{AtomicBool, Ordering::SeqCst};
    use metal::arch::dma::OneToOne;
    use metal::arch::pci::{ConfigPorts, virtio_functions};
    use metal::arch::{self, interrupts, lapic, msix, serial};
    use metal::heap::Heap;
    use virtio_drivers::device::blk::{BlkReq, BlkResp, SECTOR_SIZE, VirtIOBlk};
    use virtio_drivers::transport::DeviceType;
    use virtio_drivers::transport::pci::PciTransport;
    use virtio_drivers::transport::pci::bus::{Command, PciRoot};

    core::arch::global_asm!(include_str!("arch/boot.s"));

    const ROUNDS: usize = 500;
    const HEAP_BYTES: usize = 1 << 20;
    /// PM1a control of Bedplate's board, and what turns it off.
    const POWER: (u16, u16) = (0x604, 5 << 10 | 1 << 13);
    /// COM1's interrupt enable and line status.
    const UART: (u16, u16) = (0x3F9, 0x3FD);
    const APIC_BASE: u32 = 0x1B;
    /// An address that is neither RAM nor a device's.
    pub const NOTHING: usize = 0xFED8_0000;

    #[global_allocator]
    static HEAP: Heap = Heap::new();
    static mut ARENA: [u8; HEAP_BYTES] = [0; HEAP_BYTES];

    /// The disk's interrupt came.
    static DONE: AtomicBool = AtomicBool::new(false);

    /// From `boot.s`: the first 4 GiB are mapped one to one, interrupts are off.
    #[unsafe(no_mangle)]
    extern "C" fn metal_start(_: u64) -> ! {
        serial::initialize();
        // SAFETY: once, here; nothing else names the arena. This processor is at level 0 in 64-bit mode, interrupts off.
        unsafe {
            HEAP.claim((&raw mut ARENA).cast(), HEAP_BYTES);
            interrupts::install();
        }
        metal::log!("X87 with a full stack: 1 + -1 = {}", x87::sum_with_a_full_stack());
        metal::log!("X87 while an error waits: 1 + 1 = {}", x87::sum_while_an_error_waits());
        let nothing = cheapest(|| {});
        let tell =
            |what: &str, ticks: u64| metal::log!("EXIT-COST {what}: {}", ticks.saturating_sub(nothing));
        tell("CPUID, leaf 0", cheapest(|| cpuid(0)));
        tell("CPUID, leaf 1", cheapest(|| cpuid(1)));
        tell("IN from the UART model", cheapest(|| _ = arch::in8(UART.1)));
        tell("OUT to the UART model", cheapest(|| arch::out8(UART.0, 0)));
        // SAFETY: the register exists.
        tell("RDMSR", cheapest(|| _ = unsafe { arch::read_msr(APIC_BASE) }));
        let nowhere = core::ptr::with_exposed_provenance::<u32>(NOTHING);
        // SAFETY: reading there has no effect.
        tell("MMIO read", cheapest(|| _ = unsafe { nowhere.read_volatile() }));
        match disk_reads() {
            Some(ticks) => tell("virtio-blk read, kick to interrupt", ticks),
            None => metal::log!("EXIT-COST: there is no disk"),
        }
        metal::log!("EXIT-COST end");
        arch::out16(POWER.0, POWER.1);
        arch::power_off(true)
    }

    fn cheapest(mut operation: impl FnMut()) -> u64 {
        let once = || {
            let before = arch::tsc();
            operation();
            arch::tsc() - before
        };
        core::iter::repeat_with(once).take(ROUNDS).min().unwrap_or(0)
    }

    fn cpuid(leaf: u32) {
        core::hint::black_box(core::arch::x86_64::__cpuid_count(leaf, 0));
    }

    /// A sector from the first disk, its completion told by an interrupt.
    fn disk_reads() -> Option<u64> {
        let functions = virtio_functions();
        let place = functions.iter().find(|function| function.kind == DeviceType::Block)?.place;
        let mut root = PciRoot::new(ConfigPorts);
        root.set_command(place, Command::MEMORY_SPACE | Command::BUS_MASTER);
        let transport = PciTransport::new::<OneToOne, _>(&mut root, place).ok()?;
        let mut disk = VirtIOBlk::<OneToOne, _>::new(transport).ok()?;
        lapic::enable();
        interrupts::on_device(|| DONE.store(true, SeqCst));
        // SAFETY: registers below 4 GiB are mapped; the driver selects no queue again.
        if !unsafe { msix::enable(place, &[0]) } {
            return None;
        }
        arch::enable_interrupts();
        let (mut request, mut answer, mut sector) = (BlkReq::default(), BlkResp::default(), [0; SECTOR_SIZE]);
        let ticks = cheapest(|| {
            DONE.store(false, SeqCst);
            // SAFETY: the buffers live until the completion, which is waited for, and are not touched before.
            let token = unsafe { disk.read_blocks_nb(0, &mut request, &mut sector, &mut answer) };
            let Ok(token) = token else { return };
            while !DONE.load(SeqCst) {
                core::hint::spin_loop();
            }
            // SAFETY: the same buffers.
            let done = unsafe { disk.complete_read_blocks(token, &request, &mut sector, &mut answer) };
            assert!(done.is_ok(), "the disk cannot be read");
        });
        arch::disable_interrupts();
        Some(ticks)
    }

    #[panic_handler]
    fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
        metal::panic::report(info)
    }
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("bedplate-exit-bench is a guest of bedplate-metal: `cargo xtask metal test` boots it");
    std::process::exit(2);
}
