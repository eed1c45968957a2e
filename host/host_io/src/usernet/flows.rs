//! The table of flows: who speaks with whom, who has work to do, and when somebody must be looked at.
//!
//! Called by: `usernet::nat`. Invariants: ids are never used twice; a flow is at most once on the work list; the counts
//! that the limits are held against are those of the table.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::{SocketAddr, SocketAddrV4};

use smoltcp::time::Instant;

use super::datagram::DatagramFlow;
use super::tcp::TcpFlow;
use super::world::FlowId;

/// What kind of flow a key names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Tcp,
    Udp,
    /// The guest's "port" is the identifier.
    Echo,
}

/// Both ends, as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) kind: Kind,
    pub(super) guest: SocketAddrV4,
    pub(super) remote: SocketAddrV4,
}

/// What a flow is made of.
pub(super) enum Body<S> {
    Tcp(TcpFlow<S>),
    Datagram(DatagramFlow<S>),
}

/// A flow in the table.
pub(super) struct Flow<S> {
    pub(super) key: Key,
    pub(super) last_active: Instant,
    pub(super) body: Body<S>,
    deadline: Option<Instant>,
    listed: bool,
}

/// All flows of one guest.
pub(super) struct Flows<S> {
    flows: HashMap<FlowId, Flow<S>>,
    by_key: HashMap<Key, FlowId>,
    by_peer: HashMap<(usize, SocketAddr), FlowId>,
    deadlines: BTreeSet<(Instant, FlowId)>,
    work: VecDeque<FlowId>,
    tcp_count: usize,
    next_id: u64,
}

impl<S> Flows<S> {
    pub(super) fn new() -> Flows<S> {
        Flows {
            flows: HashMap::new(),
            by_key: HashMap::new(),
            by_peer: HashMap::new(),
            deadlines: BTreeSet::new(),
            work: VecDeque::new(),
            tcp_count: 0,
            next_id: 0,
        }
    }

    /// An id for a flow that is about to be made.
    pub(super) fn reserve_id(&mut self) -> FlowId {
        self.next_id += 1;
        FlowId(self.next_id)
    }

    /// Adds a flow under a reserved id. The key must be free.
    pub(super) fn insert(&mut self, id: FlowId, key: Key, body: Body<S>, now: Instant) {
        match &body {
            Body::Tcp(_) => self.tcp_count += 1,
            Body::Datagram(DatagramFlow::Forwarded { forward, peer }) => {
                _ = self.by_peer.insert((*forward, *peer), id)
            }
            Body::Datagram(_) => {}
        }
        self.by_key.insert(key, id);
        self.flows.insert(id, Flow { key, last_active: now, body, deadline: None, listed: false });
    }

    /// Ends a flow.
    pub(super) fn remove(&mut self, id: FlowId) -> Option<Flow<S>> {
        let flow = self.flows.remove(&id)?;
        self.by_key.remove(&flow.key);
        match &flow.body {
            Body::Tcp(_) => self.tcp_count -= 1,
            Body::Datagram(DatagramFlow::Forwarded { forward, peer }) => {
                _ = self.by_peer.remove(&(*forward, *peer))
            }
            Body::Datagram(_) => {}
        }
        if let Some(at) = flow.deadline {
            self.deadlines.remove(&(at, id));
        }
        Some(flow)
    }

    pub(super) fn get_mut(&mut self, id: FlowId) -> Option<&mut Flow<S>> {
        self.flows.get_mut(&id)
    }

    pub(super) fn find(&self, key: &Key) -> Option<FlowId> {
        self.by_key.get(key).copied()
    }

    /// The flow of a peer behind a forwarded UDP port.
    pub(super) fn find_peer(&self, forward: usize, peer: SocketAddr) -> Option<FlowId> {
        self.by_peer.get(&(forward, peer)).copied()
    }

    pub(super) fn tcp_count(&self) -> usize {
        self.tcp_count
    }

    pub(super) fn datagram_count(&self) -> usize {
        self.flows.len() - self.tcp_count
    }

    /// The flow that was silent longest among those that `may_go`.
    pub(super) fn oldest(&self, may_go: impl Fn(&Flow<S>) -> bool) -> Option<FlowId> {
        let candidates = self.flows.iter().filter(|(_, flow)| may_go(flow));
        candidates.min_by_key(|(id, flow)| (flow.last_active, **id)).map(|(id, _)| *id)
    }

    /// Has the flow looked at when there is time.
    pub(super) fn list(&mut self, id: FlowId) {
        if let Some(flow) = self.flows.get_mut(&id)
            && !std::mem::replace(&mut flow.listed, true)
        {
            self.work.push_back(id);
        }
    }

    /// The next flow with work.
    pub(super) fn next_listed(&mut self) -> Option<FlowId> {
        loop {
            let id = self.work.pop_front()?;
            if let Some(flow) = self.flows.get_mut(&id) {
                flow.listed = false;
                return Some(id);
            }
        }
    }

    pub(super) fn has_work(&self) -> bool {
        !self.work.is_empty()
    }

    /// Has the flow looked at when that time comes.
    pub(super) fn set_deadline(&mut self, id: FlowId, at: Option<Instant>) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        if let Some(old) = std::mem::replace(&mut flow.deadline, at) {
            self.deadlines.remove(&(old, id));
        }
        self.deadlines.extend(at.map(|at| (at, id)));
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// A flow whose time has come; its deadline is gone.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<FlowId> {
        let (at, id) = *self.deadlines.first()?;
        if at > now {
            return None;
        }
        self.deadlines.pop_first();
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.deadline = None;
        }
        Some(id)
    }
}
