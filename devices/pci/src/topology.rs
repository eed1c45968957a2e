//! The tree of functions: who answers which configuration address, and which BAR stands where.
//!
//! Each function reports what it decodes (and a bridge, what it forwards) through its [`Place`] whenever a
//! register changes, under its own lock. The tree then moves regions on the machine's buses: those that
//! are to leave first, then those that are to come, in order of attachment; so a region that finds its
//! place taken, or lies outside of the windows above it, is decoded nowhere and tried again at the next change.
//! Doorbells follow the BARs that they are in. Lock order: function → tree → bus map, doorbells. The tree never locks a
//! function.

use crate::address::Devfn;
use crate::config::{BridgeState, Decoded, Space};
use crate::core_state::PciFunction;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use device::{Bus, Device, Doorbell, RegionId, Register};
use sync::Mutex;

/// Where the machine lets PCI functions decode; inclusive ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Windows {
    /// Ports.
    pub io: Vec<(u64, u64)>,
    /// Memory below 4 GiB.
    pub memory32: Vec<(u64, u64)>,
    /// Memory above 4 GiB.
    pub memory64: Vec<(u64, u64)>,
}

impl Windows {
    fn admit(&self, space: Space, range: (u64, u64)) -> bool {
        match space {
            Space::Io => inside(self.io.iter(), range),
            Space::Memory => inside(self.memory32.iter().chain(&self.memory64), range),
        }
    }
}

fn inside<'a>(mut windows: impl Iterator<Item = &'a (u64, u64)>, (first, last): (u64, u64)) -> bool {
    windows.any(|w| w.0 <= first && last <= w.1)
}

/// A function of the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FunctionId(usize);

/// What a function hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Parent {
    /// Bus 0.
    Root,
    /// The secondary bus of a bridge.
    Bridge(FunctionId),
}

/// A function that cannot be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// There is one already.
    #[error("PCI slot {0} is taken")]
    Taken(Devfn),
    /// The parent is not there or not a bridge.
    #[error("there is no bridge to attach PCI function {0} to")]
    NoBridge(Devfn),
}

/// What went unanswered.
#[derive(Default)]
pub struct TopologyStats {
    /// Regions that found no place: overlapping, or outside of the windows above them.
    pub unplaced: AtomicU64,
}

pub(crate) type SharedFunction = Arc<Mutex<dyn PciFunction>>;

struct Node {
    parent: Parent,
    devfn: Devfn,
    function: SharedFunction,
    device: Arc<Mutex<dyn Device>>,
    decoded: Vec<Decoded>,
    mapped: Vec<(Decoded, RegionId)>,
    bridge: Option<BridgeState>,
    doorbells: Vec<(Register, Arc<dyn Doorbell>)>,
}

impl Node {
    /// The doorbells of BAR `bar`, which begins at `base` now, or is nowhere.
    fn place_doorbells(&self, bar: u8, base: Option<u64>) {
        for (register, doorbell) in &self.doorbells {
            if register.region == usize::from(bar) {
                doorbell.set_place(base.map(|base| base + register.offset));
            }
        }
    }
}

/// A slot keeps its number for ever, so that a stale id finds nothing.
type Nodes = Vec<Option<Node>>;

/// See the module's header.
pub struct Topology {
    windows: Windows,
    /// Not owned: the buses hold the functions, and the configuration access, which holds this.
    memory: Weak<Bus>,
    io: Weak<Bus>,
    nodes: Mutex<Nodes>,
    /// Counters.
    pub stats: TopologyStats,
}

impl Topology {
    /// An empty root bus whose functions decode within `windows` of the two buses, which the machine owns.
    pub fn new(windows: Windows, memory: &Arc<Bus>, io: &Arc<Bus>) -> Arc<Self> {
        let (nodes, stats) = (Mutex::new(Vec::new()), TopologyStats::default());
        Arc::new(Self { windows, memory: Arc::downgrade(memory), io: Arc::downgrade(io), nodes, stats })
    }

    /// Where functions may decode.
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// Puts `function` into a slot. Not to be called under the lock of a function.
    pub fn attach<F: PciFunction + 'static>(
        self: &Arc<Self>,
        parent: Parent,
        devfn: Devfn,
        function: Arc<Mutex<F>>,
    ) -> Result<FunctionId, AttachError> {
        let doorbells = function.lock().core().doorbells().to_vec();
        let mut nodes = self.nodes.lock();
        if let Parent::Bridge(bridge) = parent {
            let is_bridge = nodes.get(bridge.0).and_then(Option::as_ref).is_some_and(|n| n.bridge.is_some());
            if !is_bridge {
                return Err(AttachError::NoBridge(devfn));
            }
        }
        if nodes.iter().flatten().any(|n| n.parent == parent && n.devfn == devfn) {
            return Err(AttachError::Taken(devfn));
        }
        let id = nodes.len();
        let (shared, device): (SharedFunction, Arc<Mutex<dyn Device>>) = (function.clone(), function.clone());
        let (decoded, mapped) = (Vec::new(), Vec::new());
        nodes.push(Some(Node {
            parent,
            devfn,
            function: shared,
            device,
            decoded,
            mapped,
            bridge: None,
            doorbells,
        }));
        drop(nodes);
        function.lock().core_mut().set_place(Place { topology: Arc::downgrade(self), id });
        Ok(FunctionId(id))
    }

    /// Takes a function and everything behind it out of the tree.
    pub fn detach(&self, id: FunctionId) {
        let mut gone = Vec::new();
        let mut nodes = self.nodes.lock();
        let mut doomed = alloc::vec![id.0];
        while let Some(index) = doomed.pop() {
            let Some(node) = nodes.get_mut(index).and_then(Option::take) else { continue };
            for (decoded, region) in &node.mapped {
                node.place_doorbells(decoded.bar, None);
                if let Some(bus) = self.bus(decoded.space) {
                    bus.remove(*region);
                }
            }
            gone.push(node);
            let child =
                |n: &Option<Node>| n.as_ref().is_some_and(|n| n.parent == Parent::Bridge(FunctionId(index)));
            doomed.extend(nodes.iter().enumerate().filter(|(_, n)| child(n)).map(|(i, _)| i));
        }
        drop(nodes);
        // Functions are dropped last, outside of the lock: their destructors may do anything.
        drop(gone);
    }

    /// The function at `bus` and `devfn`, by the bridges' present bus numbers.
    pub(crate) fn find(&self, bus: u8, devfn: Devfn) -> Option<SharedFunction> {
        let nodes = self.nodes.lock();
        let mut parent = Parent::Root;
        if bus != 0 {
            // Down the tree; its depth is bounded by its size.
            for _ in 0..nodes.len() {
                let holds =
                    |b: &BridgeState| b.secondary != 0 && (b.secondary..=b.subordinate).contains(&bus);
                let (index, bridge) = nodes.iter().enumerate().find_map(|(i, n)| {
                    let n = n.as_ref().filter(|n| n.parent == parent)?;
                    Some((i, n.bridge.filter(holds)?))
                })?;
                parent = Parent::Bridge(FunctionId(index));
                if bridge.secondary == bus {
                    return at(&nodes, parent, devfn);
                }
            }
            return None;
        }
        at(&nodes, parent, devfn)
    }

    /// All functions below `parent`, by slot.
    pub(crate) fn children(&self, parent: Parent) -> Vec<(FunctionId, Devfn, SharedFunction)> {
        let nodes = self.nodes.lock();
        let below = nodes.iter().enumerate().filter_map(|(i, n)| {
            let n = n.as_ref().filter(|n| n.parent == parent)?;
            Some((FunctionId(i), n.devfn, n.function.clone()))
        });
        let mut below: Vec<_> = below.collect();
        below.sort_by_key(|(_, devfn, _)| *devfn);
        below
    }

    fn bus(&self, space: Space) -> Option<Arc<Bus>> {
        match space {
            Space::Io => self.io.upgrade(),
            Space::Memory => self.memory.upgrade(),
        }
    }

    fn update(&self, id: usize, decoded: Vec<Decoded>, bridge: Option<BridgeState>) {
        let mut nodes = self.nodes.lock();
        let Some(Some(node)) = nodes.get_mut(id) else { return };
        if node.decoded == decoded && node.bridge == bridge && node.mapped.len() == decoded.len() {
            return;
        }
        (node.decoded, node.bridge) = (decoded, bridge);
        self.place_all(&mut nodes);
    }

    fn place_all(&self, nodes: &mut Nodes) {
        let wanted: Vec<Vec<Decoded>> = nodes.iter().map(|n| self.admitted(nodes, n.as_ref())).collect();
        for (node, wanted) in nodes.iter_mut().zip(&wanted) {
            let Some(node) = node else { continue };
            let (stay, leave) =
                core::mem::take(&mut node.mapped).into_iter().partition(|(d, _)| wanted.contains(d));
            node.mapped = stay;
            for (decoded, region) in leave {
                node.place_doorbells(decoded.bar, None);
                if let Some(bus) = self.bus(decoded.space) {
                    bus.remove(region);
                }
            }
        }
        for (node, wanted) in nodes.iter_mut().zip(wanted) {
            let Some(node) = node else { continue };
            for decoded in wanted {
                if node.mapped.iter().any(|(m, _)| *m == decoded) {
                    continue;
                }
                let device = node.device.clone();
                let Decoded { bar, space, base, bytes } = decoded;
                let region =
                    self.bus(space).and_then(|bus| bus.insert(base, bytes, device, usize::from(bar)).ok());
                match region {
                    Some(region) => {
                        node.mapped.push((decoded, region));
                        node.place_doorbells(bar, Some(base));
                    }
                    None => self.count_unplaced(),
                }
            }
        }
    }

    /// What of a function's regions passes all windows above it.
    fn admitted(&self, nodes: &Nodes, node: Option<&Node>) -> Vec<Decoded> {
        let Some(node) = node else { return Vec::new() };
        let passes = |d: &Decoded| {
            let Some(last) = d.base.checked_add(d.bytes - 1) else { return false };
            let range = (d.base, last);
            let mut parent = node.parent;
            for _ in 0..nodes.len() {
                let Parent::Bridge(FunctionId(index)) = parent else { break };
                let Some((above, bridge)) =
                    nodes.get(index).and_then(Option::as_ref).and_then(|n| Some((n.parent, n.bridge?)))
                else {
                    return false;
                };
                let passes = match d.space {
                    Space::Io => inside(bridge.io.iter(), range),
                    Space::Memory => inside(bridge.memory.iter().flatten(), range),
                };
                if !passes {
                    return false;
                }
                parent = above;
            }
            self.windows.admit(d.space, range)
        };
        let (admitted, refused): (Vec<Decoded>, Vec<Decoded>) = node.decoded.iter().partition(|d| passes(d));
        refused.iter().for_each(|_| self.count_unplaced());
        admitted
    }

    fn count_unplaced(&self) {
        self.stats.unplaced.fetch_add(1, Ordering::Relaxed);
    }
}

fn at(nodes: &Nodes, parent: Parent, devfn: Devfn) -> Option<SharedFunction> {
    nodes.iter().flatten().find(|n| n.parent == parent && n.devfn == devfn).map(|n| n.function.clone())
}

/// A function's handle on its place in the tree.
pub(crate) struct Place {
    topology: Weak<Topology>,
    id: usize,
}

impl Place {
    /// What the function decodes and forwards from now on.
    pub fn update(&self, decoded: Vec<Decoded>, bridge: Option<BridgeState>) {
        if let Some(topology) = self.topology.upgrade() {
            topology.update(self.id, decoded, bridge);
        }
    }
}
