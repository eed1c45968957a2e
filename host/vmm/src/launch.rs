//! From a resolved spec to a running VM, and to its end.
//!
//! Called by: the `bedplate` command. Everything that the VM holds (terminal, sockets, locks) is given back before
//! [`run`] returns.

use crate::bell::Bell;
use crate::control::folder;
use crate::control::server::{ControlSocket, ServeError};
use crate::desk::Desk;
use crate::driver::{Driver, Policy, SaveJobs};
use crate::engine::{self, EngineUnavailable, Engines};
use crate::hang_watch::Looking;
use crate::host::Host;
use crate::saved_file::{LoadFileError, SavedVm};
use crate::services::{DeviceEvents, lock};
use crate::vcpu_threads::{Next, RunVcpu, VcpuThreads};
use crate::wire::{DiskSpec, EngineChoice, OnPanic, SpecError, VmSpec, check_name};
use cpu_translate::Journal;
use guest_time::GuestClock;
use host_io::clock::{HostClock, monotonic_ns};
use host_io::event_loop::{EventLoop, LoopTimer};
use host_io::signals::EndSignals;
use hypervisor::{CpuModel, Hypervisor, Statistics};
use jail::{FileUse, JailError};
use machine::{BootError, BuildError, Machine, PanicWatch, Parts, Request, RequestQueue, Verdict};
use machine_spec::MachineSpec;
use std::io::IsTerminal;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// How long a panicked kernel may stand still before the VM ends.
const PANIC_PATIENCE_NS: u64 = 2_000_000_000;

/// Why a VM could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The spec is wrong.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The machine cannot be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The engine cannot be had.
    #[error(transparent)]
    Engine(#[from] EngineUnavailable),
    /// Nothing can be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The saved VM cannot be brought back.
    #[error(transparent)]
    Load(#[from] LoadFileError),
    /// There is no control socket.
    #[error(transparent)]
    Control(#[from] ServeError),
    /// A disk that is to stay as it is cannot have an overlay.
    #[error(transparent)]
    Disk(#[from] disk_formats::DiskError),
    /// The jail cannot be closed.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// A thread or the event loop cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
    /// A file that was asked for.
    #[error("what is translated cannot be written down: {0}")]
    Trace(std::io::Error),
}

impl RunVcpu for Machine {
    fn run(&self, id: u32) -> Next {
        match self.run_vcpu(id) {
            machine::Next::Run => Next::Run,
            machine::Next::Wait(at) => Next::Wait(at),
        }
    }
    fn kick(&self, id: u32) {
        Machine::kick(self, id);
    }
    fn died(&self, id: u32) {
        self.fail(format!("the thread of CPU {id} died, which is a fault of this program's"));
    }
}

/// A VM that was run to its end.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Why it ended.
    pub verdict: Verdict,
    /// What its vCPUs did.
    pub statistics: Statistics,
}

/// Says something to people before the guest does.
pub type Say<'a> = &'a dyn Fn(&str);

/// How a VM is run.
#[derive(Clone, Copy)]
pub struct Manner<'a> {
    /// Hears why its engine is not the one that may be expected, and what the jail lacks.
    pub say: Say<'a>,
    /// In the jail.
    pub jailed: bool,
    /// Write guest and host code of all that is translated here.
    pub blocks: Option<&'a Path>,
    /// Write the map of translated code that `perf` looks for.
    pub perf_map: bool,
}

impl Manner<'_> {
    fn journal(&self) -> Result<Option<Arc<Journal>>, LaunchError> {
        if self.blocks.is_none() && !self.perf_map {
            return Ok(None);
        }
        Ok(Some(Arc::new(Journal::create(self.blocks, self.perf_map).map_err(LaunchError::Trace)?)))
    }
}

/// Runs the VM of a resolved spec to its end.
pub fn run(vm: &VmSpec, manner: Manner<'_>) -> Result<Ended, LaunchError> {
    // Before an engine is asked for anything: what is wrong with it is said first.
    MachineSpec::try_from(vm)?;
    let engines = Engines::open(manner.journal()?);
    let engine = choose(&engines, vm.engine, manner.say)?;
    let vm = &VmSpec { cpu_model: cpu_model(vm, &*engine, manner.say), ..vm.clone() };
    let mut spec = MachineSpec::try_from(vm)?;
    // A new guest's TSC may run at any rate: so that its engine can give it without scaling.
    if let Some(khz) = engine.capabilities().tsc_khz {
        spec.clock.tsc_khz = khz;
    }
    let start = Start { vm, spec, engine, engines, booted_here: true };
    launch(start, manner, |machine, host| Ok(machine.boot(host)?))
}

/// The CPU model of a new VM: one that was not named leaves out what an engine lacks that was.
fn cpu_model(vm: &VmSpec, engine: &dyn Hypervisor, say: Say<'_>) -> Option<String> {
    let mut model = CpuModel::parse(vm.cpu_model()).ok()?;
    let here = engine.capabilities();
    let missing = here.features.missing_from(model.features);
    if vm.cpu_model.is_some() || vm.engine == EngineChoice::Auto || missing.is_empty() {
        return vm.cpu_model.clone();
    }
    // What every model has cannot be left out: the engine refuses it then.
    missing.iter().for_each(|feature| _ = model.remove(feature));
    say(&format!("engine {} lacks some of {}: the CPU model is {model}", here.name, vm.cpu_model()));
    Some(model.to_string())
}

fn choose(engines: &Engines, choice: EngineChoice, say: Say<'_>) -> Result<Box<dyn Hypervisor>, LaunchError> {
    let chosen = engines.choose(choice)?;
    if let Some(note) = chosen.note {
        say(&note);
    }
    if engines.leaves_journal_empty(&*chosen.engine) {
        let name = chosen.engine.capabilities().name;
        say(&format!(
            "--trace-blocks and --perf-map stay empty under engine {name}: --engine soft writes them"
        ));
    }
    Ok(chosen.engine)
}

/// What a saved VM is to have other than it had.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes<'a> {
    /// Its name.
    pub name: Option<&'a str>,
    /// Its engine.
    pub engine: Option<EngineChoice>,
    /// Its disks are other files; see [`SavedVm::restore`].
    pub disks_moved: bool,
    /// Where they are now; empty: where they were.
    pub disks: &'a [DiskSpec],
}

/// Brings a saved VM back and runs it to its end.
pub fn restore(file: &Path, changes: Changes<'_>, manner: Manner<'_>) -> Result<Ended, LaunchError> {
    let mut saved = SavedVm::open(file)?;
    if !changes.disks.is_empty() {
        saved.use_disks(changes.disks)?;
    }
    let mut vm = saved.vm.clone();
    if let Some(name) = changes.name {
        check_name(name)?;
        vm.name = Some(name.into());
    }
    vm.engine = changes.engine.unwrap_or(vm.engine);
    let spec = saved.machine.clone();
    let engines = Engines::open(manner.journal()?);
    let engine = choose(&engines, vm.engine, manner.say)?;
    let start = Start { vm: &vm, spec, engine, engines, booted_here: false };
    let moved = changes.disks_moved;
    launch(start, manner, |machine, host| Ok(saved.restore(machine, host, moved)?))
}

/// What a VM is made of.
struct Start<'a> {
    vm: &'a VmSpec,
    spec: MachineSpec,
    engine: Box<dyn Hypervisor>,
    engines: Engines,
    booted_here: bool,
}

/// Builds the machine, has `prepare` give it what it starts with, and runs it.
fn launch(
    start: Start<'_>,
    Manner { say, jailed, .. }: Manner<'_>,
    prepare: impl FnOnce(&Machine, &Host) -> Result<(), LaunchError>,
) -> Result<Ended, LaunchError> {
    let Start { vm, spec, engine, engines, booted_here } = start;
    if jailed {
        cpu_kvm::on_thread_start(|| jail::enter(jail::Thread::Watch, &[]));
        jail::arm()?.into_iter().for_each(say);
    }
    let on_terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    if on_terminal && vm.serial.iter().chain(&vm.consoles).any(|end| end == "stdio") {
        say("Ctrl-A x ends the VM, Ctrl-A h shows the keys");
    }
    // Before the first thread: all inherit the mask.
    let signals = EndSignals::block()?;
    let bell = Arc::new(Bell::default());
    let requests = Arc::new(RequestQueue::new({
        let bell = bell.clone();
        move || bell.ring()
    }));
    let clock = GuestClock::new(Box::new(HostClock));
    clock.set_rate(spec.clock.rate.numerator, spec.clock.rate.denominator);
    let events = EventLoop::start("events")?;
    let _end_signals = signals.watch(&events.handle(), {
        let requests = requests.clone();
        move |_| {
            // Refused only when it has ended already.
            let _ = requests.ask(Request::Stop(Verdict::Killed));
        }
    })?;
    let watch = Arc::new(PanicWatch::default());
    let on_panic = panic_timer(&events, &watch, &requests, vm.on_panic);
    let device_events = DeviceEvents::new(events.handle(), clock.clone());
    let host = Arc::new(Host::new(vm.clone(), device_events, requests.clone(), watch.clone(), on_panic));
    let machine = Arc::new(build(vm, spec, &*engine, &engines, &host, &requests, say)?);
    prepare(&machine, &host)?;
    leave_frozen_disks(&host)?;
    host.open_boot_files();
    let engines = Arc::new(engines);
    let saves = Arc::new(SaveJobs::default());
    let name = vm.name.clone().unwrap_or_else(|| format!("vm-{}", std::process::id()));
    let desk = Desk {
        vm: vm.clone(),
        name: name.clone(),
        machine: Arc::downgrade(&machine),
        host: Arc::downgrade(&host),
        engines: engines.clone(),
        clock: clock.clone(),
        requests: requests.clone(),
        bell: bell.clone(),
        saves: saves.clone(),
    };
    let control = ControlSocket::open(&name, Arc::new(desk))?;
    let threads = VcpuThreads::start(machine.clone(), host.beds().to_vec(), &clock)?;
    let _hangs = watch_for_hangs(&events, &threads, &machine);
    // From here on nothing is opened by name.
    jail::close(&own_files(&host))?;
    let policy = Policy { on_reset: vm.on_reset, on_panic: vm.on_panic };
    let driver =
        Driver { machine, host, engines, requests, bell, threads, watch, saves, policy, booted_here };
    // A machine that was just built can be started.
    let _ = driver.requests.ask(Request::Start);
    let verdict = driver.run();
    let statistics = driver.machine.statistics();
    drop(control);
    Ok(Ended { verdict, statistics })
}

/// What the main thread does with files by name while the VM runs: its control socket's file goes, and a block device's
/// identity is read.
fn own_files(host: &Host) -> Vec<FileUse> {
    let mut files =
        vec![FileUse::RemoveIn(folder::path()), FileUse::Read("/proc/sys/kernel/random/boot_id".into())];
    for (_, disk) in host.disks() {
        if let Ok(found) = std::fs::metadata(disk.image().path())
            && found.file_type().is_block_device()
        {
            let (major, minor) = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
            files.push(FileUse::Read(format!("/sys/dev/block/{major}:{minor}").into()));
        }
    }
    files
}

/// A vCPU that does not come out of its engine ends the VM.
fn watch_for_hangs(events: &EventLoop, threads: &VcpuThreads, machine: &Arc<Machine>) -> Arc<Looking> {
    let (kicked, failed) = (Arc::downgrade(machine), Arc::downgrade(machine));
    let kick = move |id| {
        if let Some(machine) = kicked.upgrade() {
            machine.kick(id);
        }
    };
    let hangs = move |id, seconds| {
        if let Some(machine) = failed.upgrade() {
            let engine = machine.engine_name();
            machine.fail(format!("CPU {id} did not come out of engine {engine} for {seconds} s"));
        }
    };
    Looking::start(&events.handle(), threads.turns(), kick, hangs)
}

/// Gives every disk whose image is to stay as it is an overlay, and says so.
fn leave_frozen_disks(host: &Host) -> Result<(), LaunchError> {
    for (_, disk) in host.disks() {
        let image = disk.image();
        if let Some(overlay) = disk.leave_frozen()? {
            let (image, overlay) = (image.path().display(), overlay.display());
            eprintln!("bedplate: {image} stays as it is; what the guest writes goes to {overlay}\r");
        }
    }
    Ok(())
}

/// Builds the machine. An engine that was not asked for by name gives way to one that serves everywhere.
fn build(
    vm: &VmSpec,
    spec: MachineSpec,
    engine: &dyn Hypervisor,
    engines: &Engines,
    host: &Host,
    requests: &Arc<RequestQueue>,
    say: Say<'_>,
) -> Result<Machine, LaunchError> {
    let on = |engine: &dyn Hypervisor, spec| {
        Machine::build(spec, &Parts { engine, host, requests: requests.clone() })
    };
    match on(engine, spec.clone()) {
        Err(BuildError::Engine(error)) if vm.engine == EngineChoice::Auto => {
            let other = choose(engines, engine::EVERYWHERE, say)?;
            say(&format!("engine {}, because: {error}", other.capabilities().name));
            Ok(on(&*other, spec)?)
        }
        built => Ok(built?),
    }
}

/// What is called with a kernel's last words: a while later, if nobody has spoken since, the VM ends.
fn panic_timer(
    events: &EventLoop,
    watch: &Arc<PanicWatch>,
    requests: &Arc<RequestQueue>,
    policy: OnPanic,
) -> Arc<dyn Fn() + Send + Sync> {
    if policy == OnPanic::Keep {
        return Arc::new(|| {});
    }
    let (watch, requests) = (watch.clone(), requests.clone());
    let timer: LoopTimer = events.handle().timer(move || {
        if let Some(detail) = watch.ended() {
            requests.guest_asks(Request::Stop(Verdict::Panicked { detail }));
        }
    });
    let timer = Mutex::new(timer);
    Arc::new(move || lock(&timer).set(Some(monotonic_ns().saturating_add(PANIC_PATIENCE_NS))))
}
