//! One VM: its machine, its ground, and where its vCPUs stand.

use super::console::Port;
use super::host::{Resources, VmHost};
use crate::arch::clock;
use crate::bundle::Bundle;
use crate::vm_spec::{DiskSource, VmSpec};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::arch::x86_64::__cpuid_count;
use guest_time::GuestNs;
use hypervisor::Hypervisor;
use machine::{BuildError, HostServices, Machine, Next, Parts, Request, RequestQueue, State};
use machine_spec::{
    BlkSpec, BootSpec, ClockSpec, ConsoleSpec, CpuSpec, DeviceSpec, HostKey, Mac, MachineSpec, NetSpec,
    RamBacking, RamSpec, RngSpec, UartSpec, Uuid,
};

/// Polls of devices that do not come to rest, before a machine is stopped or reset all the same.
const MAX_QUIESCE: usize = 100_000;

/// See the module's header.
pub struct Vm {
    /// What it is called.
    pub name: String,
    machine: Machine,
    host: Arc<VmHost>,
    requests: Arc<RequestQueue>,
    port: Arc<Port>,
    /// What each vCPU does next.
    next: Vec<Next>,
}

impl Vm {
    /// Builds it as the bundle says and boots it; it runs from the next turn on.
    pub fn build(
        index: usize,
        spec: &VmSpec,
        bundle: &Bundle<'static>,
        resources: &Arc<Resources>,
        engine: &dyn Hypervisor,
    ) -> Result<Self, BuildError> {
        let mut files = BTreeMap::new();
        let images = spec.disks.iter().filter_map(|disk| match disk {
            DiskSource::Ram(file) => Some(file),
            DiskSource::Machine(_) => None,
        });
        for name in [&spec.kernel, &spec.initrd].into_iter().chain(images) {
            if let Some(bytes) = bundle.file(name) {
                files.insert(name.clone(), bytes);
            }
        }
        let port = Arc::new(Port::new(&spec.name));
        let disks = (0..).map(disk_key).zip(spec.disks.iter().cloned()).collect();
        let host = Arc::new(VmHost::new(resources, files, disks, port.clone()));
        let requests = Arc::new(RequestQueue::new(super::processor::Processor::want_scheduler));
        let parts = Parts { engine, host: &*host, requests: requests.clone() };
        let machine = Machine::build(machine_of(index, spec), &parts)?;
        machine.boot(&*host)?;
        // Accepted: it was just built.
        let _ = requests.ask(Request::Start);
        let next = (0..machine.vcpu_count()).map(|_| Next::Run).collect();
        Ok(Self { name: spec.name.clone(), machine, host, requests, port, next })
    }

    /// Its end of the console.
    pub fn port(&self) -> &Arc<Port> {
        &self.port
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.requests.state() == State::Stopped
    }

    /// Does what it was asked, and what its devices wait for.
    pub fn serve(&mut self) {
        while let Some((_, request)) = self.requests.begin() {
            let done = self.perform(&request);
            if let Err(reason) = &done {
                crate::log!("VM `{}`: {reason}", self.name);
            }
            self.requests.finish(done.is_ok());
            if let Some(verdict) = self.requests.verdict() {
                crate::log!("VM `{}` has ended: {verdict:?}", self.name);
                self.show_statistics();
            }
        }
        self.port.give();
        self.host.serve();
    }

    fn perform(&mut self, request: &Request) -> Result<(), String> {
        match request {
            Request::Start | Request::Resume => {
                self.host.clock().resume();
                self.machine.resume();
            }
            Request::Pause => self.stand_still(),
            Request::Stop(_) => self.stand_still(),
            Request::Reset => {
                crate::log!("VM `{}` resets", self.name);
                self.stand_still();
                self.machine.reset(&*self.host).map_err(|error| error.to_string())?;
                self.next.fill(Next::Run);
                self.host.clock().resume();
                self.machine.resume();
            }
            Request::Save { .. } | Request::Move { .. } | Request::Evade { .. } => {
                return Err("saving and moving are not there yet on bare metal".into());
            }
        }
        Ok(())
    }

    /// No vCPU of it runs: this is the only processor.
    fn stand_still(&self) {
        for _ in 0..MAX_QUIESCE {
            if self.machine.quiesce().is_ready() {
                break;
            }
            self.host.serve();
        }
        self.host.clock().pause();
    }

    /// Asks it for something.
    pub fn ask(&self, request: Request) -> Result<(), String> {
        self.requests.ask(request).map_err(|refused| refused.to_string())
    }

    /// In a line, for people.
    pub fn describe(&self) -> String {
        let spec = self.machine.spec();
        let (state, cpus, mib) = (self.requests.state().name(), spec.cpus.count, spec.ram.bytes >> 20);
        format!("{}: {state}, {cpus} vCPUs, {mib} MiB", self.name)
    }

    /// Tells its exits and its time.
    pub fn show_statistics(&self) {
        let statistics = self.machine.statistics();
        crate::log!("VM `{}` ran for {} ms", self.name, statistics.busy_ns / 1_000_000);
        statistics.counts.iter().for_each(|(name, count)| crate::log!("  {name}: {count}"));
    }

    /// Number of its vCPUs.
    pub fn vcpu_count(&self) -> u32 {
        self.machine.vcpu_count()
    }

    /// Gives vCPU `id` a turn up to `turn_ends`, in our time, if it has something to do; whether it had.
    pub fn run(&mut self, id: u32, turn_ends: u64) -> bool {
        if self.requests.state() != State::Running || !self.requests.is_idle() || !self.is_due(id) {
            return false;
        }
        super::processor::Processor::grant_until(turn_ends);
        self.next[id as usize] = self.machine.run_vcpu(id);
        true
    }

    fn is_due(&self, id: u32) -> bool {
        let woken = self.host.take_woken(id);
        match self.next[id as usize] {
            Next::Run => true,
            Next::Wait(at) => woken || at.is_some_and(|at| self.host.clock().now() >= at),
        }
    }

    /// When the next timer of its devices or of a vCPU that waits is due, later than `now`, in our time.
    pub fn wakes_after(&self, now: u64) -> Option<u64> {
        if self.requests.state() != State::Running {
            return None;
        }
        let in_our_time = |at: GuestNs| Some(now.saturating_add(self.host.clock().host_ns_until(at)?));
        let vcpus = self.next.iter().filter_map(|next| match next {
            Next::Run => None,
            Next::Wait(at) => in_our_time((*at)?),
        });
        vcpus.chain(self.host.next_timer()).filter(|at| *at > now).min()
    }
}

/// The machine that a VM of the bundle is. Its TSC runs at the processor's rate: that needs no exit.
fn machine_of(index: usize, vm: &VmSpec) -> MachineSpec {
    let mut uuid = *b"bedplate-metal\0\0";
    uuid[15] = index as u8;
    // The guest's physical addresses are the processor's: it checks page tables against its own width.
    let own_bits = __cpuid_count(0x8000_0008, 0).eax as u8;
    let mut parts = vm.cpu_model.split(',').map(str::trim);
    let model = parts.next().unwrap_or_default().into();
    let features = parts.map(|text| machine_spec::CpuFeature {
        name: text.trim_start_matches(['+', '-']).into(),
        enabled: !text.starts_with('-'),
    });
    let features = features.collect();
    let default = CpuSpec::default();
    let address_bits = own_bits.min(default.address_bits);
    MachineSpec {
        name: vm.name.clone(),
        uuid: Uuid(uuid),
        cpus: CpuSpec { count: vm.cpus, max: vm.cpus, model, features, address_bits },
        ram: RamSpec { bytes: vm.memory_mib << 20, hotplug_bytes: 0, backing: RamBacking::Anonymous },
        boot: BootSpec {
            kernel: HostKey(vm.kernel.clone()),
            initrd: (!vm.initrd.is_empty()).then(|| HostKey(vm.initrd.clone())),
            command_line: vm.append.clone(),
        },
        clock: ClockSpec { tsc_khz: clock::tsc_khz(), ..ClockSpec::default() },
        devices: devices_of(index, vm),
    }
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
    let stream = |what: &str| Some(HostKey(format!("{}-{what}", vm.name)));
    let mut devices = alloc::vec![
        DeviceSpec::Uart(UartSpec { port: 0, stream: stream("serial") }),
        DeviceSpec::Rng(RngSpec { id: "rng0".into(), slot: None }),
    ];
    devices.extend((0..vm.disks.len()).map(|number| {
        let (id, serial) = (disk_key(number), String::new());
        let disk = HostKey(id.clone());
        DeviceSpec::Blk(BlkSpec { id, disk, read_only: false, serial, discard: false, slot: None })
    }));
    if vm.net {
        let backend = HostKey("switch".into());
        devices.push(DeviceSpec::Net(NetSpec { id: "net0".into(), mac: mac_of(index), backend, slot: None }));
    }
    if vm.virtio_console {
        let stream = stream("console");
        devices.push(DeviceSpec::Console(ConsoleSpec { id: "console0".into(), stream, slot: None }));
    }
    devices
}
