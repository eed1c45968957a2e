//! `bedplate-exit-bench`: a guest that tells what its exits cost, in ticks of the time-stamp counter. Where the emulator
//! counts instructions (QEMU's `-icount shift=0`) and the guest's counter is the processor's, a tick is an instruction.
//!
//! Booted by PVH as a guest of `bedplate-metal`, with one virtio disk; `cargo xtask metal test` compares what it says with
//! what was pinned. `cargo xtask metal costs` boots it as a guest of KVM and of Xen, too. Of each operation the cheapest
//! of many counts: no timer came between.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
#[path = "exit_bench/x87.rs"]
mod x87;

#[cfg(target_os = "none")]
mod guest {
    use crate::x87;
    use core::arch::asm;
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
    /// The address of PCI's configuration space.
    const PCI_ADDRESS: u16 = 0xCF8;
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
    extern "C" fn metal_start(start_info: u64) -> ! {
        serial::initialize();
        metal::log!("EXIT-COST begin");
        // SAFETY: once, here; nothing else names the arena. This processor is at level 0 in 64-bit mode, interrupts off.
        unsafe {
            HEAP.claim((&raw mut ARENA).cast(), HEAP_BYTES);
            interrupts::install();
        }
        // Not every hypervisor's interpreter has x87 instructions.
        if has_command_line(start_info, b"x87\0") {
            metal::log!("X87 with a full stack: 1 + -1 = {}", x87::sum_with_a_full_stack());
            metal::log!("X87 while an error waits: 1 + 1 = {}", x87::sum_while_an_error_waits());
        }
        let nothing = cheapest(|| {});
        let tell =
            |what: &str, ticks: u64| metal::log!("EXIT-COST {what}: {}", ticks.saturating_sub(nothing));
        tell("CPUID, leaf 0", cheapest(|| cpuid(0)));
        tell("CPUID, leaf 1", cheapest(|| cpuid(1)));
        tell("IN from the UART model", cheapest(|| _ = arch::in8(UART.1)));
        tell("OUT to the UART model", cheapest(|| arch::out8(UART.0, 0)));
        tell("IN from the host bridge model", cheapest(|| _ = arch::in32(PCI_ADDRESS)));
        tell("OUT to the host bridge model", cheapest(|| arch::out32(PCI_ADDRESS, 0)));
        // SAFETY: the register exists.
        tell("RDMSR", cheapest(|| _ = unsafe { arch::read_msr(APIC_BASE) }));
        let nowhere = core::ptr::with_exposed_provenance::<u32>(NOTHING);
        // SAFETY: reading there has no effect.
        tell("MMIO read", cheapest(|| _ = unsafe { nowhere.read_volatile() }));
        match disk_reads() {
            Some(ticks) => tell("virtio-blk read, kick to interrupt", ticks),
            None => metal::log!("EXIT-COST: there is no disk"),
        }
        if let Some(kib) = xen::own_memory_kib() {
            metal::log!("XEN-MEMORY {kib}");
        }
        metal::log!("EXIT-COST end");
        arch::out16(POWER.0, POWER.1);
        arch::power_off(true)
    }

    /// Whether the command line of `hvm_start_info` is this one.
    fn has_command_line(start_info: u64, text: &[u8]) -> bool {
        let at = core::ptr::with_exposed_provenance::<u64>(start_info as usize + 24);
        // SAFETY: the loader leads to its structure, and from there to a string or nowhere: memory that is mapped.
        unsafe {
            let line = core::ptr::with_exposed_provenance::<u8>(at.read_unaligned() as usize);
            !line.is_null() && text.iter().enumerate().all(|(n, byte)| line.add(n).read() == *byte)
        }
    }

    fn cheapest(mut operation: impl FnMut()) -> u64 {
        let once = || {
            let before = arch::tsc();
            operation();
            arch::tsc() - before
        };
        core::iter::repeat_with(once).take(ROUNDS).min().unwrap_or(0)
    }

    /// What Xen tells its first domain (xen/include/public).
    mod xen {
        const MEMORY_OP: u64 = 12;
        const CURRENT_RESERVATION: u64 = 3;
        const DOMAIN_SELF: u16 = 0x7FF0;
        const SYSCTL: u64 = 35;
        const PHYSICAL_INFO: u64 = 3;
        /// Xen 4.17's `XEN_SYSCTL_INTERFACE_VERSION`.
        const VERSION: u64 = 0x15;
        /// Where `struct xen_sysctl` has `total_pages` and `free_pages`, in words.
        const TOTAL: usize = 6;
        const FREE: usize = 7;

        fn call(number: u64, first: u64, second: u64) -> i64 {
            let result;
            // SAFETY: the caller found Xen; the calls below write to what their argument points to only.
            unsafe {
                core::arch::asm!("vmmcall", inout("rax") number => result, inout("rdi") first => _,
                    inout("rsi") second => _, options(nostack));
            }
            result
        }

        /// Memory that is neither free nor this domain's; `None`: this is no first domain of Xen 4.17 on AMD.
        pub fn own_memory_kib() -> Option<u64> {
            let id = core::arch::x86_64::__cpuid(0x4000_0000);
            let name = [id.ebx, id.ecx, id.edx].map(u32::to_le_bytes);
            if name.as_flattened() != b"XenVMMXenVMM" {
                return None;
            }
            let domain = DOMAIN_SELF;
            let own = call(MEMORY_OP, CURRENT_RESERVATION, (&raw const domain).expose_provenance() as u64);
            let mut info = [0u64; 32];
            info[0] = PHYSICAL_INFO | VERSION << 32;
            let result = call(SYSCTL, info.as_mut_ptr().expose_provenance() as u64, 0);
            let pages = info[TOTAL].checked_sub(info[FREE])?.checked_sub(u64::try_from(own).ok()?)?;
            (result == 0).then_some(pages * 4)
        }
    }

    /// Its bytes lie in one word of 8 whatever the linker does: looking for them in two costs more.
    fn cpuid(leaf: u32) {
        // SAFETY: RBX, which is the compiler's, comes back.
        unsafe {
            asm!(".p2align 3", "mov {rbx}, rbx", "cpuid", "mov rbx, {rbx}",
                rbx = out(reg) _, inout("eax") leaf => _, inout("ecx") 0 => _, out("edx") _,
                options(nomem, nostack, preserves_flags));
        }
    }

    /// A sector from the first disk, its completion told by an interrupt.
    fn disk_reads() -> Option<u64> {
        let functions = virtio_functions();
        let place = functions.iter().find(|function| function.kind == DeviceType::Block)?.place;
        let mut root = PciRoot::new(ConfigPorts);
        root.set_command(place, Command::MEMORY_SPACE | Command::BUS_MASTER);
        let transport = PciTransport::new::<OneToOne, _>(&mut root, place).ok()?;
        let mut disk = VirtIOBlk::<OneToOne, _>::new(transport).ok()?;
        lapic::mask_legacy_controllers();
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
