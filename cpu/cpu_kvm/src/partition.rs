//! A partition: RAM in slots, the split interrupt controller, interrupts in.
//!
//! KVM has the local APICs; the I/O APIC is the machine's, and its pins' messages are told to KVM only so that it
//! reports the EOIs of those that are level-triggered (`routing.rs`). All interrupts come in as messages (KVM_SIGNAL_MSI, or
//! bells).
//!
//! Lock order: time → messages → routing, or a vCPU's times.

use crate::dirty_log::{self, KvmDirtyLog, Rings};
use crate::doorbells::Ioeventfds;
use crate::ioctls::{error, map_ram};
use crate::kick::KickCell;
use crate::routing::{PINS, Routing};
use crate::statistics::Counters;
use crate::time::{Frozen, Time, TscControl};
use crate::vcpu::KvmVcpu;
use crate::watch::{Count, Verdict, Watch};
use apic::{DeliveryMode, Message};
use guest_memory::GuestRam;
use hypervisor::{
    Bell, DirtyLog, Doorbells, EngineError, IrqSink, Msi, MsiRoute, MsiSink, Partition, PartitionLayout,
    Statistics, Trigger, Vcpu, Wake,
};
use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API,
    KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_msi,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use saved_state::{RestoreError, StateBlob};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use sync::{Mutex, Once, RwLock};

/// Pages of Intel's hardware that no guest sees, below the firmware's place: task state and identity map.
const TSS_ADDRESS: usize = 0xFFFB_D000;
const IDENTITY_MAP_ADDRESS: u64 = 0xFFFB_C000;
/// Takes a line for people.
pub type Log = Arc<dyn Fn(&str) + Send + Sync>;

/// One vCPU as the partition and others see it.
#[derive(Default)]
pub struct VcpuCell {
    /// How it is stopped.
    pub kick: Arc<KickCell>,
    /// Its file, a second time: for what is done to all vCPUs while none runs.
    pub fd: Once<VcpuFd>,
    /// What its clocks mean while it does not run.
    pub times: Mutex<Frozen>,
    /// How many instructions KVM emulated for it, if it counts them. Opened before it runs: KVM would have that wait.
    pub emulated: Once<Option<Count>>,
    /// A message in ExtINT mode waits for its acknowledge cycle.
    pub extint: AtomicBool,
}

/// What the vCPUs of a partition share.
pub struct Shared {
    /// Dropped before the layout's RAM.
    pub vm: VmFd,
    /// As asked for.
    pub layout: PartitionLayout,
    /// By number.
    pub vcpus: Vec<VcpuCell>,
    /// The TSC's rate, if it is scaled.
    pub scale: Option<u32>,
    /// Plain MSRs that KVM has.
    pub msrs: Once<Vec<u32>>,
    /// See `Processor::xsave_beyond`.
    pub xsave_beyond: Option<usize>,
    /// KVM's clocks.
    pub time: Mutex<Time>,
    /// See [`TscControl`].
    pub tsc_control: Once<TscControl>,
    /// Held by who sends a message; alone by who must not be disturbed by one.
    pub messages: RwLock<()>,
    /// Level of the 8259's output.
    pub pic_line: AtomicBool,
    /// Messages that KVM knows by number.
    pub routing: Routing,
    /// What happened so far.
    pub counters: Counters,
    /// Whether CPUID shows the guest its CPU model.
    pub sound: AtomicBool,
    /// The probe found that this KVM does not run real guests.
    pub doubted: AtomicBool,
    /// What people are told.
    pub log: Log,
    /// That another engine would serve the guest better.
    pub unsuited: Verdict,
    /// The vCPUs' dirty rings, where writes are logged so.
    pub rings: Option<Mutex<Rings>>,
    /// Writes are logged.
    pub logging: AtomicBool,
}

/// How a partition is to be.
#[derive(Clone)]
pub struct Options {
    /// What people are told.
    pub log: Log,
    /// Entries of each vCPU's dirty ring; `None`: writes are logged in bitmaps.
    pub dirty_ring: Option<u32>,
}

/// Maps all of `ram`, with a log of its writes or without; also where it is mapped already.
pub fn map_all(vm: &VmFd, ram: &GuestRam, log: bool) -> io::Result<()> {
    for (slot, region) in ram.regions().iter().enumerate() {
        let host = ram.host_base().wrapping_add(region.offset as usize);
        // SAFETY: the region lies in the span, which the partition's layout keeps mapped until after `vm` is dropped;
        // nobody makes references to guest RAM.
        unsafe { map_ram(vm, slot as u32, region, host, log) }?;
    }
    Ok(())
}

/// See the module's header.
pub struct KvmPartition {
    shared: Arc<Shared>,
    _watch: Watch,
}

impl KvmPartition {
    /// For `layout`; `scale`: its TSC's rate, if that is not the host's.
    pub fn new(
        kvm: &Kvm,
        layout: &PartitionLayout,
        scale: Option<u32>,
        options: Options,
    ) -> io::Result<Self> {
        let vm = kvm.create_vm().map_err(|e| not_made(error(e)))?;
        // Intel's processors need them; others do not mind.
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(error)?;
        vm.set_tss_address(TSS_ADDRESS).map_err(error)?;
        enable(&vm, KVM_CAP_SPLIT_IRQCHIP, PINS as u64)?;
        enable(&vm, KVM_CAP_X2APIC_API, KVM_X2APIC_API_USE_32BIT_IDS.into())?;
        // Without it KVM raises #UD in place of an instruction that it cannot emulate: always at CPL 3, and at CPL 0
        // besides telling us (kvm/x86.c, handle_emulation_failure).
        if vm.check_extension_raw(KVM_CAP_EXIT_ON_EMULATION_FAILURE.into()) > 0 {
            enable(&vm, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)?;
        }
        // So that a shutdown that waits is in the events; older kernels do not tell.
        if vm.check_extension_raw(KVM_CAP_X86_TRIPLE_FAULT_EVENT.into()) > 0 {
            enable(&vm, KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)?;
        }
        crate::msr::divert(&vm)?;
        if let Some(entries) = options.dirty_ring {
            dirty_log::ring::enable(&vm, entries)?;
        }
        map_all(&vm, &layout.ram, false)?;
        let vcpus = (0..layout.vcpus).map(|_| VcpuCell::default()).collect();
        let xsave_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let xsave_beyond =
            xsave_bytes.checked_sub(size_of::<kvm_bindings::kvm_xsave>()).map(|beyond| beyond.div_ceil(4));
        let shared = Arc::new(Shared {
            vm,
            layout: layout.clone(),
            vcpus,
            scale,
            msrs: Once::new(),
            xsave_beyond,
            time: Mutex::default(),
            tsc_control: Once::new(),
            messages: RwLock::new(()),
            pic_line: AtomicBool::new(false),
            routing: Routing::default(),
            counters: Counters::default(),
            sound: AtomicBool::new(true),
            doubted: AtomicBool::new(false),
            log: options.log,
            unsuited: Verdict::default(),
            rings: options.dirty_ring.map(|entries| Mutex::new(Rings::new(entries, layout.ram.pages()))),
            logging: AtomicBool::new(false),
        });
        let _watch = Watch::start(&shared)?;
        Ok(Self { shared, _watch })
    }
}

impl KvmPartition {
    /// What its vCPUs share.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

fn enable(vm: &VmFd, cap: u32, argument: u64) -> io::Result<()> {
    let mut cap = kvm_enable_cap { cap, ..kvm_enable_cap::default() };
    cap.args[0] = argument;
    vm.enable_cap(&cap).map_err(error)
}

/// What people can do where KVM makes no VM.
fn not_made(error: io::Error) -> io::Error {
    if error.raw_os_error() != Some(libc::EBUSY) {
        return error;
    }
    let text = "another hypervisor holds the processor's virtualization: end it, or take --engine soft";
    io::Error::new(io::ErrorKind::ResourceBusy, text)
}

impl Drop for KvmPartition {
    fn drop(&mut self) {
        // The RAM goes on in another partition, perhaps.
        KvmDirtyLog(self.shared.clone()).stop();
    }
}

impl Partition for KvmPartition {
    // Halted vCPUs sleep in KVM, which wakes them.
    fn create_vcpu(&self, id: u32, _: Arc<dyn Wake>) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(KvmVcpu::create(&self.shared, id)?))
    }
    fn irq_sink(&self) -> Arc<dyn IrqSink> {
        Arc::new(Sink(self.shared.clone()))
    }
    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        Arc::new(Sink(self.shared.clone()))
    }
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        Ioeventfds::of(&self.shared)
    }
    fn dirty_log(&self) -> Option<Arc<dyn DirtyLog>> {
        Some(Arc::new(KvmDirtyLog(self.shared.clone())))
    }
    // Everything that outlives a vCPU's `run` is in the vCPUs' states, or comes from the devices anew.
    fn save(&self) -> Result<Vec<StateBlob>, EngineError> {
        Ok(Vec::new())
    }
    fn restore(&self, blobs: &[StateBlob]) -> Result<(), RestoreError> {
        match blobs.first() {
            None => Ok(()),
            Some(b) => Err(RestoreError::Kind { got: b.kind.clone(), expected: "nothing".into() }),
        }
    }
    fn reset(&self) {
        self.shared.pic_line.store(false, Ordering::SeqCst);
    }
    fn statistics(&self) -> Statistics {
        self.shared.counters.statistics()
    }
}

impl Shared {
    /// Sends an interrupt message.
    pub fn signal(&self, msi: Msi) {
        match Message::from_msi(msi.address, msi.data) {
            // KVM knows ExtINT at LINT0 only.
            Some(message) if message.mode == DeliveryMode::ExtInt => {
                if let Some(cell) = self.vcpus.get(message.destination as usize) {
                    cell.extint.store(true, Ordering::SeqCst);
                    cell.kick.nudge();
                }
            }
            Some(_) => {
                let _one_of_many = self.messages.read();
                let msi = kvm_msi {
                    address_lo: msi.address as u32,
                    address_hi: (msi.address >> 32) as u32,
                    data: msi.data,
                    ..kvm_msi::default()
                };
                // A message for nobody is lost on hardware, too.
                let _ = self.vm.signal_msi(msi);
            }
            None => {}
        }
    }
}

struct Sink(Arc<Shared>);

impl IrqSink for Sink {
    fn deliver(&self, msi: Msi) {
        self.0.signal(msi);
    }
    fn set_ioapic_route(&self, pin: u32, msi: Option<Msi>, trigger: Trigger) {
        // A masked pin's interrupt may still be in service: its last message stays.
        if let Some(msi) = msi.filter(|_| trigger == Trigger::Level)
            && let Err(error) = self.0.routing.set_pin(&self.0.vm, pin, msi)
        {
            self.0.counters.fail(format!("KVM does not take the message of pin {pin}: {error}"));
        }
    }
    fn pic_line_changed(&self, level: bool) {
        self.0.pic_line.store(level, Ordering::SeqCst);
        if let Some(boot) = self.0.vcpus.first().filter(|_| level) {
            boot.kick.nudge();
        }
    }
}

impl MsiSink for Sink {
    fn route(&self) -> Result<Box<dyn MsiRoute>, EngineError> {
        let state = RouteState { msi: Msi::default(), masked: true, number: None };
        Ok(Box::new(Route { shared: self.0.clone(), state: Mutex::new(state) }))
    }
}

struct RouteState {
    msi: Msi,
    masked: bool,
    /// With a bell.
    number: Option<u32>,
}

/// Lock order: state → routing.
struct Route {
    shared: Arc<Shared>,
    state: Mutex<RouteState>,
}

impl Route {
    fn change(&self, change: impl FnOnce(&mut RouteState)) {
        let mut state = self.state.lock();
        change(&mut state);
        let shared = &self.shared;
        if let Some(number) = state.number
            && let Err(error) = shared.routing.change(&shared.vm, number, state.msi, state.masked)
        {
            shared.counters.fail(format!("KVM does not take the message of a bell: {error}"));
        }
    }
}

impl MsiRoute for Route {
    fn set(&self, msi: Msi) {
        self.change(|state| (state.msi, state.masked) = (msi, false));
    }
    fn fire(&self) {
        let state = self.state.lock();
        let (msi, masked) = (state.msi, state.masked);
        drop(state);
        if !masked {
            self.shared.signal(msi);
        }
    }
    fn mask(&self, masked: bool) {
        self.change(|state| state.masked = masked);
    }
    fn attach(&self, bell: &Arc<dyn Bell>) -> Result<(), EngineError> {
        let Shared { vm, routing, .. } = &*self.shared;
        let mut state = self.state.lock();
        if let Some(number) = state.number.take() {
            routing.remove(vm, number);
        }
        let number = routing.add(vm, bell.clone(), state.msi)?;
        state.number = Some(number);
        routing.change(vm, number, state.msi, state.masked)
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        if let Some(number) = self.state.lock().number {
            self.shared.routing.remove(&self.shared.vm, number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kvm_that_is_busy_says_what_to_do() {
        let busy = not_made(io::Error::from_raw_os_error(libc::EBUSY)).to_string();
        assert!(busy.contains("another hypervisor") && busy.contains("--engine soft"), "{busy}");
        let other = not_made(io::Error::from_raw_os_error(libc::ENOMEM));
        assert_eq!(other.raw_os_error(), Some(libc::ENOMEM));
    }
}
