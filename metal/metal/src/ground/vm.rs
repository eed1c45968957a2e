//! One VM: its machine, its ground, and where its vCPUs stand.

use super::console::Port;
use super::host::{Holdings, Place, Resources, VmHost};
use super::processor::Processor;
use super::saved::{self, MAX_RECORD, Saved};
use crate::arch::clock;
use crate::bundle::Bundle;
use crate::disk::Store;
use crate::heap;
use crate::vm_spec::{DiskSource, OnCrash, SavedSource, VmSpec};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::arch::x86_64::__cpuid_count;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use cpu_soft::SoftHypervisor;
use guest_time::GuestNs;
use machine::saved_vm::ByteSource;
use machine::{BootError, HostServices, Machine, Next, Origin, Parts, Request, RequestQueue, State, Verdict};
use machine_spec::{
    BlkSpec, BootSpec, ClockSpec, ConsoleSpec, CpuSpec, DeviceSpec, HostKey, Mac, MachineSpec, NetSpec,
    RamBacking, RamSpec, RngSpec, UartSpec, Uuid,
};
use sync::{Mutex, RwLock};

/// Polls of devices that do not come to rest, before a machine is stopped or reset all the same.
const MAX_QUIESCE: usize = 100_000;
/// What a vCPU takes of the heap, most of it for the interpreter's caches: measured with 1.5 MiB.
const VCPU_BYTES: u64 = 2 << 20;
/// What a machine takes besides.
const MACHINE_BYTES: u64 = 2 << 20;
/// Shortest time between two starts of a VM: a reset costs time that is nobody's turn.
const RESTART_GAP_NS: u64 = 1_000_000_000;

/// What VMs are made of.
pub struct Works {
    /// What the loader brought.
    pub bundle: Bundle<'static>,
    /// Memory and devices of the machine.
    pub resources: Arc<Resources>,
    /// What runs guest code.
    pub engine: SoftHypervisor,
}

/// See the module's header.
pub struct Vm {
    /// What it is called.
    pub name: String,
    index: usize,
    spec: VmSpec,
    port: Arc<Port>,
    holdings: Arc<Holdings>,
    /// What it runs on, until it is started again; `None`: that failed.
    body: RwLock<Option<Body>>,
}

struct Body {
    machine: Machine,
    host: Arc<VmHost>,
    requests: Arc<RequestQueue>,
    seats: Vec<Seat>,
    /// In our time: it does not run before.
    runs_from: AtomicU64,
    /// What a host is to know of it when it is saved.
    host_spec: Vec<u8>,
}

/// A vCPU's place among those that want a processor.
struct Seat {
    /// What it does next.
    next: Mutex<Next>,
    place: Arc<Place>,
}

/// What came of a request.
enum Done {
    Yes,
    /// Not that: this comes next.
    Instead(Request),
}

impl Vm {
    /// Builds it as the bundle says and boots it; it runs from the next turn on.
    pub fn build(index: usize, spec: &VmSpec, works: &Works) -> Result<Self, String> {
        let port = Arc::new(Port::new(&spec.name));
        let holdings = Arc::new(Holdings::default());
        let body = RwLock::new(Some(Body::build(index, spec, works, &port, &holdings)?));
        Ok(Self { name: spec.name.clone(), index, spec: spec.clone(), port, holdings, body })
    }

    /// Starts it anew, with its disks as they are; only once it has ended.
    pub fn start_again(&self, works: &Works) -> Result<(), String> {
        if !self.has_ended() {
            return Err("it runs, or stands still: resume it, or stop it before".into());
        }
        self.port.forget_panic();
        let mut body = self.body.write();
        // Nobody has the old one any more: with it goes what it has of the processors, the heap and the switch, of which
        // there may not be enough for two.
        *body = None;
        *body = Some(Body::build(self.index, &self.spec, works, &self.port, &self.holdings)?);
        Ok(())
    }

    /// Its end of the console.
    pub fn port(&self) -> &Arc<Port> {
        &self.port
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.body.read().as_ref().is_none_or(|body| body.requests.state() == State::Stopped)
    }

    /// Does what it was asked, and what its devices wait for. By one processor at a time.
    pub fn serve(&self) {
        let body = self.body.read();
        let Some(body) = body.as_ref() else { return };
        if let Some(detail) = self.port.panic_ended() {
            body.requests.guest_asks(Request::Stop(Verdict::Panicked { detail }));
        }
        while let Some((origin, request)) = body.requests.begin() {
            let done = self.perform(body, origin, &request);
            if let Err(reason) = &done {
                crate::log!("VM `{}`: {reason}", self.name);
            }
            body.requests.finish(matches!(done, Ok(Done::Yes)));
            if let Ok(Done::Instead(request)) = done {
                // Refused only when it has ended.
                let _ = body.requests.ask(request);
            }
            if let Some(verdict) = body.requests.verdict() {
                crate::log!("VM `{}` has ended: {verdict:?}", self.name);
                body.show_statistics(&self.name);
            }
        }
        self.port.give();
        body.host.serve();
    }

    fn perform(&self, body: &Body, origin: Origin, request: &Request) -> Result<Done, String> {
        match request {
            Request::Start | Request::Resume => body.go(),
            Request::Pause => body.stand_still(),
            Request::Stop(verdict) => {
                body.stand_still();
                if origin == Origin::Guest && is_crash(verdict) && self.spec.on_crash == OnCrash::Restart {
                    crate::log!("VM `{}` has crashed: {verdict:?}", self.name);
                    return Ok(Done::Instead(Request::Reset));
                }
            }
            Request::Reset => {
                body.stand_still();
                let panic = self.port.panicked().filter(|_| origin == Origin::Guest);
                if let Some(detail) = panic
                    && self.spec.on_crash == OnCrash::End
                {
                    return Ok(Done::Instead(Request::Stop(Verdict::Panicked { detail })));
                }
                crate::log!("VM `{}` resets", self.name);
                self.port.forget_panic();
                if let Err(error) = body.boot_again() {
                    crate::log!("VM `{}` cannot boot again: {error}", self.name);
                    let reason = error.to_string();
                    return Ok(Done::Instead(Request::Stop(Verdict::Failed { reason })));
                }
            }
            Request::Save { .. } => {
                let was_running = body.requests.state() == State::Running;
                body.stand_still();
                match self.save(body) {
                    Ok(bytes) => crate::log!("VM `{}` is saved ({} MiB)", self.name, bytes.div_ceil(1 << 20)),
                    Err(reason) => {
                        if was_running {
                            body.go();
                        }
                        return Err(format!("it cannot be saved: {reason}"));
                    }
                }
            }
            Request::Move { .. } | Request::Evade { .. } => {
                return Err("there is no other engine on bare metal".into());
            }
        }
        Ok(Done::Yes)
    }

    /// Writes it to the disk that its spec names.
    fn save(&self, body: &Body) -> Result<u64, String> {
        let number = self.spec.save_to.ok_or("its spec names no disk to save to (save = \"machine:1\")")?;
        let store = body.host.machine_store(number).map_err(|error| error.0)?;
        let mut disks = Vec::new();
        for key in saved::disk_keys(body.machine.spec()) {
            let mut store = body.host.store(key).map_err(|error| error.0)?;
            store.flush().map_err(|error| format!("{key}: {error:?}"))?;
            disks.push((key.into(), store.info().bytes));
        }
        saved::save(store, &body.machine, &*body.host, &body.host_spec, &disks)
            .map_err(|error| error.to_string())
    }

    /// Asks it for something.
    pub fn ask(&self, request: Request) -> Result<(), String> {
        let body = self.body.read();
        let body = body.as_ref().ok_or("it could not be started again")?;
        body.requests.ask(request).map_err(|refused| refused.to_string())
    }

    /// In a line, for people.
    pub fn describe(&self) -> String {
        let body = self.body.read();
        let Some(body) = body.as_ref() else { return format!("{}: could not be started again", self.name) };
        let spec = body.machine.spec();
        let (state, cpus, mib) = (body.requests.state().name(), spec.cpus.count, spec.ram.bytes >> 20);
        let ran = body.machine.statistics().busy_ns / 1_000_000;
        format!("{}: {state}, {cpus} vCPUs, {mib} MiB, ran for {ran} ms", self.name)
    }

    /// Tells its exits and its time.
    pub fn show_statistics(&self) {
        if let Some(body) = self.body.read().as_ref() {
            body.show_statistics(&self.name);
        }
    }

    /// Number of its vCPUs.
    pub fn vcpu_count(&self) -> u32 {
        self.body.read().as_ref().map_or(0, |body| body.machine.vcpu_count())
    }

    /// Takes vCPU `id` for this processor if it has something to do; whether it had. [`Vm::run`] must follow.
    pub fn claim(&self, id: u32) -> bool {
        // One that is being built has nothing to do.
        let Some(body) = self.body.try_read() else { return false };
        let Some(body) = body.as_ref() else { return false };
        let Some(seat) = body.seats.get(id as usize) else { return false };
        if !seat.place.take() {
            return false;
        }
        // In this order: who lets it stand still asks first, and looks at the places then.
        let may = body.requests.is_idle() && body.requests.state() == State::Running;
        let due = may && clock::now_ns() >= body.runs_from.load(Relaxed) && body.is_due(seat);
        if !due {
            seat.place.leave();
        }
        due
    }

    /// Gives vCPU `id`, which was claimed, a turn up to `turn_ends`, in our time.
    pub fn run(&self, id: u32, turn_ends: u64) {
        let body = self.body.read();
        let Some(body) = body.as_ref() else { return };
        if let Some(seat) = body.seats.get(id as usize) {
            Processor::grant_until(turn_ends);
            let next = body.machine.run_vcpu(id);
            *seat.next.lock() = next;
            seat.place.leave();
        }
    }

    /// When the next timer of its devices or of a vCPU that waits is due, later than `now`, in our time.
    pub fn wakes_after(&self, now: u64) -> Option<u64> {
        let body = self.body.try_read()?;
        let body = body.as_ref()?;
        if body.requests.state() != State::Running {
            return None;
        }
        let clock = body.host.clock();
        let in_our_time = |at: GuestNs| Some(now.saturating_add(clock.host_ns_until(at)?));
        let vcpus = body.seats.iter().filter_map(|seat| match *seat.next.lock() {
            Next::Run => None,
            Next::Wait(at) => in_our_time(at?),
        });
        let start = Some(body.runs_from.load(Relaxed));
        vcpus.chain(body.host.next_timer()).chain(start).filter(|at| *at > now).min()
    }
}

/// Whether the guest, or what it runs on, broke down.
fn is_crash(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::TripleFault { .. } | Verdict::Panicked { .. } | Verdict::Failed { .. })
}

impl Body {
    fn build(
        index: usize,
        spec: &VmSpec,
        works: &Works,
        port: &Arc<Port>,
        holdings: &Arc<Holdings>,
    ) -> Result<Self, String> {
        let mut files = BTreeMap::new();
        let boot = [(KERNEL, &spec.kernel), (INITRD, &spec.initrd)];
        let boot =
            boot.into_iter().filter(|(_, name)| !name.is_empty()).map(|(key, name)| (key.into(), name));
        let images = spec.disks.iter().filter_map(|disk| match disk {
            DiskSource::Ram(name) => Some((image_key(name), name)),
            DiskSource::Machine(_) => None,
        });
        for (key, name) in boot.chain(images) {
            let bytes = works.bundle.file(name);
            files.insert(key, bytes.ok_or_else(|| format!("the bundle has no file `{name}`"))?);
        }
        let sources = spec.disks.iter().cloned();
        let ground = |disks| {
            Arc::new(VmHost::new(&works.resources, files.clone(), disks, port.clone(), holdings.clone()))
        };
        let (host, shape, host_spec, saved) = match &spec.restore {
            None => {
                let shape = machine_of(index, spec);
                let host = ground((0..).map(disk_key).zip(sources).collect());
                let host_spec = saved::host_spec(spec, &shape).into_bytes();
                (host, shape, host_spec, None)
            }
            Some(from) => {
                // The disk that it stands on is held as any other.
                let source = saved_source(&ground(BTreeMap::new()), works, from)?;
                let mut saved = Saved::open(source).map_err(|error| error.to_string())?;
                let shape = saved.machine.clone();
                check(&shape, spec)?;
                let keys = saved::disk_keys(&shape).map(ToString::to_string);
                let host = ground(keys.zip(sources).collect());
                (host, shape, core::mem::take(&mut saved.host), Some(saved))
            }
        };
        let booted = [KERNEL, INITRD].into_iter().filter_map(|key| files.get(key));
        let booted = booted.map(|bytes| bytes.len() as u64).sum();
        let read = if saved.is_some() { MAX_RECORD as u64 } else { booted };
        check_heap(shape.cpus.count, read, heap::bytes_free())?;
        let requests = Arc::new(RequestQueue::new(Processor::want_scheduler));
        let parts = Parts { engine: &works.engine, host: &*host, requests: requests.clone() };
        let machine = Machine::build(shape, &parts).map_err(|error| error.to_string())?;
        match saved {
            None => machine.boot(&*host).map_err(|error| error.to_string())?,
            Some(saved) => {
                for key in saved::disk_keys(machine.spec()) {
                    saved.check_disk(key, host.store(key).map_err(|error| error.0)?.info().bytes)?;
                }
                saved.restore(&machine).map_err(|error| error.to_string())?;
            }
        }
        // Accepted: it was just built.
        let _ = requests.ask(Request::Start);
        let seat = |id| Seat { next: Mutex::new(Next::Run), place: host.place(id) };
        let seats = (0..machine.vcpu_count()).map(seat).collect();
        Ok(Self { machine, host, requests, seats, runs_from: AtomicU64::new(0), host_spec })
    }

    fn is_due(&self, seat: &Seat) -> bool {
        let woken = seat.place.take_woken();
        match *seat.next.lock() {
            Next::Run => true,
            Next::Wait(at) => woken || at.is_some_and(|at| self.host.clock().now() >= at),
        }
    }

    fn go(&self) {
        self.host.clock().resume();
        self.machine.resume();
        Processor::wake_idle(self.seats.len());
    }

    /// No vCPU of it runs, no device works, its time stands still.
    fn stand_still(&self) {
        // Whoever claims a vCPU from now on sees that something was asked, and gives it back.
        for (id, seat) in (0..).zip(&self.seats) {
            if seat.place.processor().is_some() {
                self.machine.kick(id);
            }
            while seat.place.processor().is_some() {
                core::hint::spin_loop();
            }
        }
        for _ in 0..MAX_QUIESCE {
            if self.machine.quiesce().is_ready() {
                break;
            }
            self.host.serve();
        }
        self.host.clock().pause();
    }

    fn boot_again(&self) -> Result<(), BootError> {
        self.machine.reset(&*self.host)?;
        self.seats.iter().for_each(|seat| *seat.next.lock() = Next::Run);
        let earliest = self.runs_from.load(Relaxed).saturating_add(RESTART_GAP_NS);
        self.runs_from.store(earliest.max(clock::now_ns()), Relaxed);
        self.go();
        Ok(())
    }

    fn show_statistics(&self, name: &str) {
        let statistics = self.machine.statistics();
        crate::log!("VM `{name}` ran for {} ms", statistics.busy_ns / 1_000_000);
        statistics.counts.iter().for_each(|(name, count)| crate::log!("  {name}: {count}"));
    }
}

/// Keys of what is booted.
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";

/// The saved VM as a stream.
fn saved_source(host: &VmHost, works: &Works, from: &SavedSource) -> Result<Box<dyn ByteSource>, String> {
    match from {
        SavedSource::File(name) => {
            let bytes = works.bundle.file(name).ok_or_else(|| format!("the bundle has no file `{name}`"))?;
            Ok(Box::new(bytes))
        }
        SavedSource::Machine(number) => {
            let store = host.machine_store(*number).map_err(|error| error.0)?;
            Ok(Box::new(saved::DiskSource::new(store)))
        }
    }
}

/// Whether the heap has room for a machine of so many vCPUs, and the longest of what is read into it.
fn check_heap(vcpus: u32, read: u64, free: usize) -> Result<(), String> {
    let need = MACHINE_BYTES + u64::from(vcpus) * VCPU_BYTES + read;
    if need > free as u64 {
        let (need, free) = (need.div_ceil(1 << 20), free >> 20);
        return Err(format!("{vcpus} vCPUs and its files want {need} MiB of the heap, {free} MiB are free"));
    }
    Ok(())
}

/// Whether a saved machine can be one here.
fn check(machine: &MachineSpec, spec: &VmSpec) -> Result<(), String> {
    let (wanted, bits) = (machine.cpus.address_bits, own_address_bits());
    if wanted > bits {
        return Err(format!("its processors have {wanted} physical address bits, this one has {bits}"));
    }
    let disks = saved::disk_keys(machine).count();
    if disks != spec.disks.len() {
        return Err(format!("it was saved with {disks} disks, bedplate.toml names {}", spec.disks.len()));
    }
    Ok(())
}

/// Physical address bits of the processor: the guest's physical addresses are its own.
fn own_address_bits() -> u8 {
    __cpuid_count(0x8000_0008, 0).eax as u8
}

/// The machine that a VM of the bundle is. Its TSC runs at the processor's rate: that needs no exit.
fn machine_of(index: usize, vm: &VmSpec) -> MachineSpec {
    let mut uuid = *b"bedplate-metal\0\0";
    uuid[15] = index as u8;
    let mut parts = vm.cpu_model.split(',').map(str::trim);
    let model = parts.next().unwrap_or_default().into();
    let features = parts.map(|text| machine_spec::CpuFeature {
        name: text.trim_start_matches(['+', '-']).into(),
        enabled: !text.starts_with('-'),
    });
    let features = features.collect();
    let default = CpuSpec::default();
    let address_bits = own_address_bits().min(default.address_bits);
    MachineSpec {
        name: vm.name.clone(),
        uuid: Uuid(uuid),
        cpus: CpuSpec { count: vm.cpus, max: vm.cpus, model, features, address_bits },
        ram: RamSpec { bytes: vm.memory_mib << 20, hotplug_bytes: 0, backing: RamBacking::Anonymous },
        boot: BootSpec {
            kernel: HostKey(KERNEL.into()),
            initrd: (!vm.initrd.is_empty()).then(|| HostKey(INITRD.into())),
            command_line: vm.append.clone(),
        },
        clock: ClockSpec { tsc_khz: clock::tsc_khz(), ..ClockSpec::default() },
        devices: devices_of(index, vm),
    }
}

/// How the file of a disk in memory is called, among those that a VM reads.
pub fn image_key(name: &str) -> String {
    format!("image:{name}")
}

/// How a VM's disk `number` is called.
fn disk_key(number: usize) -> String {
    format!("disk{number}")
}

/// Locally administered, and another for each VM.
fn mac_of(index: usize) -> Mac {
    Mac([0x52, 0x54, 0, 0xBE, 0xD0, index as u8])
}

fn devices_of(index: usize, vm: &VmSpec) -> Vec<DeviceSpec> {
    // Keys as on a host: a saved VM has them, too.
    let key = |name: &str| HostKey(name.into());
    let mut devices = alloc::vec![
        DeviceSpec::Uart(UartSpec { port: 0, stream: Some(key("serial0")) }),
        DeviceSpec::Rng(RngSpec { id: "rng0".into(), slot: None }),
    ];
    devices.extend((0..vm.disks.len()).map(|number| {
        let (id, serial) = (disk_key(number), String::new());
        let disk = HostKey(id.clone());
        DeviceSpec::Blk(BlkSpec { id, disk, read_only: false, serial, discard: false, slot: None })
    }));
    if vm.net {
        let backend = key("net0");
        devices.push(DeviceSpec::Net(NetSpec { id: "net0".into(), mac: mac_of(index), backend, slot: None }));
    }
    if vm.virtio_console {
        let stream = Some(key("console0"));
        devices.push(DeviceSpec::Console(ConsoleSpec { id: "console0".into(), stream, slot: None }));
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_does_not_fit_is_refused() {
        assert_eq!(check_heap(2, 0, 6 << 20), Ok(()));
        let refused = check_heap(254, MAX_RECORD as u64, 60 << 20).unwrap_err();
        assert_eq!(refused, "254 vCPUs and its files want 514 MiB of the heap, 60 MiB are free");
        assert!(check_heap(1, 50 << 20, 50 << 20).is_err());
    }
}
