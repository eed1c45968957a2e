//! What stands in RAM and registers before the first instruction: the kernel by direct boot, the ACPI tables, the
//! routing of interrupts.
//!
//! Called by: [`crate::Machine`] at start and at every reset.

use crate::host::{HostError, HostServices};
use alloc::string::String;
use alloc::vec::Vec;
use firmware::Segment;
use firmware::acpi::{AcpiConfig, AcpiCpu, AcpiTables, LoadTablesError};
use firmware::direct_boot::{BootCpu, BootFiles, DirectBootError, FileRole, direct_boot};
use firmware::mtrr;
use firmware::smbios::{self, SmbiosConfig};
use guest_memory::{Gpa, GuestRam};
use hypervisor::state::RunState;
use hypervisor::{VcpuIo, VcpuState};
use machine_spec::layout::{self, RamLayout, irq};
use machine_spec::{DeviceSpec, HostKey, MachineSpec};
use pci::{PIRQ_ROUTES, Topology};
use x86_defs::SegmentIndex;

/// Why nothing can be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("{role}: {source}")]
    File {
        /// `kernel` or `initrd`.
        role: &'static str,
        /// Why; names the file as the host knows it.
        source: HostError,
    },
    /// A file is not what can be booted.
    #[error("{file}: {source}")]
    Content {
        /// The file, as the host knows it.
        file: String,
        /// What is wrong with it.
        source: DirectBootError,
    },
    /// What is no file, such as the command line, cannot be booted with.
    #[error(transparent)]
    DirectBoot(DirectBootError),
    /// The ACPI tables do not fit.
    #[error(transparent)]
    Tables(#[from] LoadTablesError),
    /// The PCI functions do not fit.
    #[error(transparent)]
    Pci(#[from] pci::AssignError),
    /// RAM cannot be made zero again.
    #[error("ram: {0}")]
    Ram(HostError),
    /// Something would lie outside of RAM (an impossibility, refused all the same).
    #[error("{bytes} bytes at {gpa:#x} are not RAM")]
    NotRam {
        /// Where.
        gpa: u64,
        /// How much.
        bytes: u64,
    },
    /// The engine refuses the first processor's registers.
    #[error("the first processor's registers: {0}")]
    Registers(saved_state::RestoreError),
    /// The engine fails.
    #[error(transparent)]
    Engine(#[from] hypervisor::EngineError),
}

/// The ACPI tables of the machine.
pub fn tables(spec: &MachineSpec, layout: &RamLayout) -> AcpiTables {
    let cpus: Vec<AcpiCpu> =
        (0..spec.cpus.max).map(|apic_id| AcpiCpu { apic_id, present: apic_id < spec.cpus.count }).collect();
    let mut uarts: Vec<u8> = spec.devices.iter().filter_map(uart_port).collect();
    uarts.sort_unstable();
    firmware::acpi::build(&AcpiConfig { layout, cpus: &cpus, uarts: &uarts, i8042_keyboard: false })
}

fn uart_port(device: &DeviceSpec) -> Option<u8> {
    match device {
        DeviceSpec::Uart(uart) => Some(uart.port),
        _ => None,
    }
}

/// Reads kernel and initial RAM disk and puts them and the tables into RAM. Returns the first processor's registers.
pub fn load(
    spec: &MachineSpec,
    layout: &RamLayout,
    tables: &AcpiTables,
    ram: &GuestRam,
    host: &dyn HostServices,
) -> Result<BootCpu, BootError> {
    let read = |role, file: &HostKey| host.read_file(file).map_err(|source| BootError::File { role, source });
    let kernel = read("kernel", &spec.boot.kernel)?;
    let initrd = spec.boot.initrd.as_ref().map(|file| read("initrd", file)).transpose()?;
    let files =
        BootFiles { kernel: &kernel, initrd: initrd.as_deref(), command_line: &spec.boot.command_line };
    let loaded = tables.load(layout)?;
    let smbios = smbios::build(&SmbiosConfig {
        uuid: spec.uuid,
        cpus: spec.cpus.count,
        cpu_mhz: u16::try_from(spec.clock.tsc_khz / 1000).unwrap_or(u16::MAX),
        layout,
    });
    let boot = direct_boot(&files, &layout.e820(), Some(loaded.rsdp)).map_err(|source| {
        let file = match source.role() {
            FileRole::Kernel => Some(&spec.boot.kernel),
            FileRole::Initrd => spec.boot.initrd.as_ref(),
            FileRole::CommandLine | FileRole::BootData => None,
        };
        match file {
            Some(file) => BootError::Content { file: host.file_name(file), source },
            None => BootError::DirectBoot(source),
        }
    })?;
    for segment in loaded.segments.iter().chain([&smbios]).chain(&boot.segments) {
        write(ram, segment)?;
    }
    Ok(boot.entry)
}

fn write(ram: &GuestRam, segment: &Segment<'_>) -> Result<(), BootError> {
    let (gpa, bytes) = (segment.gpa.0, segment.bytes.len() as u64);
    let not_ram = BootError::NotRam { gpa, bytes: bytes.saturating_add(segment.zeros_after) };
    let total = bytes.checked_add(segment.zeros_after);
    let Some(offset) = total.and_then(|total| ram.offset(gpa, total)) else { return Err(not_ram) };
    ram.store_bytes(offset, &segment.bytes);
    ram.fill_bytes(offset + bytes, 0, segment.zeros_after);
    Ok(())
}

/// Interrupts as a BIOS leaves them, for kernels that use the 8259: PIRQs at ISA interrupts, which are level-triggered
/// like the SCI, and every PCI function told which is its own (ICH9 datasheet, 13.1.19, 13.1.23 and 13.4.13).
pub fn route_interrupts(topology: &Topology, io: &dyn VcpuIo) {
    let lpc = layout::ECAM.start.0 + (u64::from(layout::slot::LPC_DEVICE) << 15);
    for (register, line) in PIRQ_ROUTES.into_iter().zip(irq::PIRQ_ISA_DEFAULT) {
        io.mmio_write(Gpa(lpc + u64::from(register)), &[line]);
    }
    let level = irq::PIRQ_ISA_DEFAULT.iter().fold(1u16 << irq::SCI, |lines, line| lines | 1 << line);
    for (at, lines) in (layout::port::ELCR..).zip(level.to_le_bytes()) {
        io.pio_write(at, &[lines]);
    }
    topology.set_interrupt_lines(&irq::PIRQ_ISA_DEFAULT);
}

/// `state`, which is that of any processor after reset, with what firmware sets in all of them.
pub fn prepare(state: &mut VcpuState, spec: &MachineSpec) {
    let registers = mtrr::registers(spec.cpus.address_bits);
    state.msrs.retain(|(number, _)| registers.iter().all(|(set, _)| set != number));
    state.msrs.extend(registers);
    state.msrs.sort_unstable();
}

/// `state`, which is that of a processor after reset, at the kernel's entry.
pub fn enter(state: &mut VcpuState, boot: &BootCpu) {
    use x86_defs::segment::SegmentIndex as Index;
    const RBX: usize = 3;
    const RSP: usize = 4;
    const RSI: usize = 6;
    state.gpr = [0; 16];
    (state.gpr[RSP], state.gpr[RSI], state.gpr[RBX]) = (boot.rsp, boot.rsi, boot.rbx);
    (state.rip, state.rflags) = (boot.rip, boot.rflags);
    state.segments = [boot.data; 6];
    state.segments[Index::Cs as usize] = boot.cs;
    (state.ldtr, state.tr, state.gdtr, state.idtr) = (boot.ldt, boot.tr, boot.gdt, boot.idt);
    (state.cr0, state.cr3, state.cr4, state.efer) = (boot.cr0, boot.cr3, boot.cr4, boot.efer);
    state.run_state = RunState::Running;
}

const _: () = assert!(SegmentIndex::Cs as usize == 1, "VcpuState's order of segments");
