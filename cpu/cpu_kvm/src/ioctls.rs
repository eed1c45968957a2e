//! System calls on KVM's files that `kvm-ioctls` lacks (api.rst, sections by name).

use guest_memory::Region;
use kvm_bindings::{kvm_device_attr, kvm_ioeventfd, kvm_irqfd, kvm_run, kvm_sregs2};
use kvm_ioctls::{VcpuFd, VmFd};
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr};

const KVMIO: u32 = 0xAE;
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, kvm_irqfd);
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);

/// Group and attribute of a vCPU's TSC offset.
const TSC_CONTROL: u32 = 0;
const TSC_OFFSET: u64 = 0;

fn answer(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// KVM_GET_SREGS2: as KVM_GET_SREGS, with the PDPTEs as loaded.
pub fn get_sregs2(vcpu: &VcpuFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: a vCPU's file, and a structure of the size that the request names.
    answer(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

/// KVM_SET_SREGS2.
pub fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: as above; KVM only reads it.
    answer(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) }).map(drop)
}

/// Sets what is added to the host's TSC (KVM_VCPU_TSC_OFFSET); an error where this KVM has no such attribute.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let attribute =
        kvm_device_attr { flags: 0, group: TSC_CONTROL, attr: TSC_OFFSET, addr: (&raw const offset) as u64 };
    // SAFETY: `addr` points to the eight bytes that KVM reads for this attribute, alive during the call.
    answer(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) }).map(drop)
}

/// What is added to the host's TSC.
pub fn get_tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0u64;
    let attribute =
        kvm_device_attr { flags: 0, group: TSC_CONTROL, attr: TSC_OFFSET, addr: (&raw mut offset) as u64 };
    // SAFETY: `addr` points to the eight bytes that KVM writes for this attribute, alive during the call.
    answer(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) })?;
    Ok(offset)
}

/// KVM_X86_SETUP_MCE: the number of machine-check banks and other bits of MCG_CAP.
pub fn setup_mce(vcpu: &VcpuFd, mcg_cap: u64) -> io::Result<()> {
    // SAFETY: KVM reads the eight bytes.
    answer(unsafe { ioctl_with_ref(vcpu, KVM_X86_SETUP_MCE(), &mcg_cap) }).map(drop)
}

/// Flag of KVM_IOEVENTFD: take it back.
const DEASSIGN: u32 = 1 << kvm_bindings::kvm_ioeventfd_flag_nr_deassign;

/// KVM_IOEVENTFD: memory writes of `bytes` (0: of any width) at `at` add to eventfd `fd`; or no longer.
pub fn ioeventfd(vm: &VmFd, at: u64, bytes: u32, fd: i32, assign: bool) -> io::Result<()> {
    let flags = if assign { 0 } else { DEASSIGN };
    let request = kvm_ioeventfd { addr: at, len: bytes, fd, flags, ..kvm_ioeventfd::default() };
    // SAFETY: KVM only reads the structure, and refuses a number that is no eventfd.
    answer(unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), &request) }).map(drop)
}

/// KVM_IRQFD: what is added to eventfd `fd` (which does not block) sends the message that is routed to `gsi`; or no longer.
pub fn irqfd(vm: &VmFd, gsi: u32, fd: i32, assign: bool) -> io::Result<()> {
    // What was added before would send it, too, but stay in the eventfd, and send it again next time.
    let mut before = 0u64;
    // SAFETY: the kernel writes eight bytes to `before` at most.
    let rang = assign && unsafe { libc::read(fd, (&raw mut before).cast(), size_of::<u64>()) } > 0;
    let flags = if assign { 0 } else { kvm_bindings::KVM_IRQFD_FLAG_DEASSIGN };
    let request = kvm_irqfd { fd: fd as u32, gsi, flags, ..kvm_irqfd::default() };
    // SAFETY: KVM only reads the structure, and refuses a number that is no eventfd.
    answer(unsafe { ioctl_with_ref(vm, KVM_IRQFD(), &request) })?;
    if rang {
        // SAFETY: the kernel reads eight bytes. A counter without room has rung.
        unsafe { libc::write(fd, (&raw const before).cast(), size_of::<u64>()) };
    }
    Ok(())
}

/// KVM_RESET_DIRTY_RINGS: entries that were taken are free again, their pages clean. Gives how many.
pub fn reset_dirty_rings(vm: &VmFd) -> io::Result<i32> {
    // SAFETY: the request takes no argument.
    answer(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) })
}

/// KVM_GET_STATS_FD of a vCPU.
pub fn statistics_file(vcpu: &VcpuFd) -> io::Result<File> {
    // SAFETY: the request takes no argument; the result is a new file descriptor that nobody else has.
    let fd = answer(unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) })?;
    // SAFETY: as said.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Maps guest RAM into slot `slot`, or changes whether its writes are logged.
///
/// # Safety
/// The `bytes` at `host` stay mapped as long as `vm` exists, and no Rust reference to them is ever made.
pub unsafe fn map_ram(vm: &VmFd, slot: u32, region: &Region, host: *mut u8, log: bool) -> io::Result<()> {
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot,
        flags: if log { kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        guest_phys_addr: region.gpa,
        memory_size: region.bytes,
        userspace_addr: host as u64,
    };
    // SAFETY: the caller's promise.
    unsafe { vm.set_user_memory_region(region) }.map_err(error)
}

/// The host's TSC now.
pub fn host_tsc() -> u64 {
    // SAFETY: the instruction has no effect but its result.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// What KVM_RUN returned for, in plain form.
#[derive(Clone, Copy, Debug)]
pub enum Exit {
    /// Port access: `count` elements of `size` bytes at `offset` in the run structure's pages.
    Pio { write: bool, port: u16, size: usize, count: usize, offset: usize },
    /// Access outside RAM.
    Mmio { write: bool, at: u64, len: usize, data: [u8; 8] },
    /// The interrupt window is open.
    Window,
    /// A level-triggered interrupt of the I/O APIC ended.
    Eoi(u8),
    /// RDMSR that KVM leaves to us.
    ReadMsr(u32),
    /// WRMSR that KVM leaves to us.
    WriteMsr(u32, u64),
    /// The vCPU's dirty ring is full.
    DirtyRingFull,
    /// Shutdown of the processor.
    Shutdown,
    /// KVM cannot emulate the instruction at RIP.
    NotEmulated,
    /// Breakpoint set from outside.
    Debug,
    /// HLT, which only comes here without an APIC in the kernel.
    Halt,
    /// Nothing to do.
    Nothing,
    /// Anything else, with up to two numbers about it.
    Other(u32, [u64; 2]),
}

/// Sub-error of KVM_EXIT_INTERNAL_ERROR: emulation failed.
const SUBERROR_EMULATION: u32 = 1;

/// Reads the exit that KVM left in its run structure.
pub fn exit(run: &kvm_run) -> Exit {
    use kvm_bindings as k;
    let fields = &run.__bindgen_anon_1;
    // SAFETY: `exit_reason` says which member of the union KVM filled.
    unsafe {
        match run.exit_reason {
            k::KVM_EXIT_IO => Exit::Pio {
                write: u32::from(fields.io.direction) == k::KVM_EXIT_IO_OUT,
                port: fields.io.port,
                size: fields.io.size.into(),
                count: fields.io.count as usize,
                offset: fields.io.data_offset as usize,
            },
            k::KVM_EXIT_MMIO => Exit::Mmio {
                write: fields.mmio.is_write != 0,
                at: fields.mmio.phys_addr,
                len: (fields.mmio.len as usize).min(8),
                data: fields.mmio.data,
            },
            k::KVM_EXIT_IRQ_WINDOW_OPEN => Exit::Window,
            k::KVM_EXIT_IOAPIC_EOI => Exit::Eoi(fields.eoi.vector),
            k::KVM_EXIT_X86_RDMSR => Exit::ReadMsr(fields.msr.index),
            k::KVM_EXIT_X86_WRMSR => Exit::WriteMsr(fields.msr.index, fields.msr.data),
            k::KVM_EXIT_DIRTY_RING_FULL => Exit::DirtyRingFull,
            k::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            k::KVM_EXIT_INTERNAL_ERROR if fields.internal.suberror == SUBERROR_EMULATION => Exit::NotEmulated,
            k::KVM_EXIT_INTERNAL_ERROR => {
                Exit::Other(run.exit_reason, [fields.internal.suberror.into(), fields.internal.data[0]])
            }
            k::KVM_EXIT_FAIL_ENTRY => {
                Exit::Other(run.exit_reason, [fields.fail_entry.hardware_entry_failure_reason, 0])
            }
            k::KVM_EXIT_SYSTEM_EVENT => Exit::Other(run.exit_reason, [fields.system_event.type_.into(), 0]),
            k::KVM_EXIT_DEBUG => Exit::Debug,
            k::KVM_EXIT_HLT => Exit::Halt,
            k::KVM_EXIT_INTR => Exit::Nothing,
            other => Exit::Other(other, [0; 2]),
        }
    }
}

/// Answers a read outside RAM.
pub fn answer_mmio(run: &mut kvm_run, data: [u8; 8]) {
    run.__bindgen_anon_1.mmio.data = data;
}

/// Answers RDMSR or WRMSR; `None` is #GP(0).
pub fn answer_msr(run: &mut kvm_run, value: Option<u64>) {
    // SAFETY: the exit was one of the two, whose fields these are.
    let fields = unsafe { &mut run.__bindgen_anon_1.msr };
    fields.error = u8::from(value.is_none());
    if let Some(value) = value {
        fields.data = value;
    }
}

/// The data of a port access, in the pages behind the run structure.
pub fn pio_data(run: &mut kvm_run, offset: usize, bytes: usize, mapped: usize) -> Option<&mut [u8]> {
    if offset < size_of::<kvm_run>() || offset.checked_add(bytes)? > mapped {
        return None;
    }
    // SAFETY: the vCPU's mapping is `mapped` bytes long and begins with the run structure; the range lies behind
    // the structure, so it overlaps no reference, and KVM does not touch it until the next KVM_RUN.
    Some(unsafe { core::slice::from_raw_parts_mut((run as *mut kvm_run).cast::<u8>().add(offset), bytes) })
}

/// The system's answer as an I/O error.
pub fn error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
