//! User-mode network: a guest NIC on the host's sockets, without privilege.
//!
//! Called by: `vmm`, one `UserNet` for each NIC `user,...`.
//!
//! The guest sees the network that QEMU made known: 10.0.2.0/24, gateway 10.0.2.2, name server 10.0.2.3, itself 10.0.2.15
//! by DHCP. TCP, UDP and ICMP echo go out by the host's own sockets; forwarded ports lead in. What is where:
//!
//! ```text
//! UserNetPort ⇄ driver (thread, epoll) ─► nat (decides; no I/O) ─► tcp, datagram, dhcp, dns, fragments
//!                    └► sockets (Linux) ◄─ world (traits) ◄──┘ └► link (Ethernet, ARP, frames for the guest)
//! ```
//!
//! Invariants:
//! - Everything a guest can make us hold is bounded: flows by `Limits`, bytes a flow by `TCP_BUFFER_BYTES`, frames by queues.
//! - The host's loopback is out of reach unless `hostloopback=on`, then at 10.0.2.2; link-local addresses always are.
//!   The host's other addresses are reached as any host of its network reaches them.
//! - After a restore in a new process the guest's old connections are answered with RST.
#![forbid(unsafe_code)]

pub mod addresses;
mod config;
mod datagram;
mod dhcp;
mod dns;
mod driver;
mod flows;
mod fragments;
mod link;
mod nat;
mod sockets;
mod tcp;
#[cfg(test)]
mod tests;
mod world;

pub use config::{Forward, Limits, Protocol, Resolvers, UserNetConfig};
pub use driver::UserNetPort;
pub use tcp::TCP_BUFFER_BYTES;

/// Why a user-mode network could not be made.
#[derive(Debug, thiserror::Error)]
pub enum UserNetError {
    /// The text of `--net` is wrong.
    #[error("network `{text}`: {field}: {problem}")]
    Config {
        /// What was written.
        text: String,
        /// The option that is wrong.
        field: String,
        /// What is wrong with it, and what is expected.
        problem: String,
    },
    /// A forwarded port is taken or not allowed.
    #[error(
        "network: hostfwd: cannot listen on {} ({:?}): {source}; choose another port, or stop who uses it", forward.host, forward.protocol
    )]
    Listen {
        /// The forward.
        forward: Forward,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The thread or its descriptors could not be made.
    #[error("network: cannot start: {0}")]
    Start(#[source] std::io::Error),
}

/// Makes user-mode networks.
#[derive(Clone, Copy, Debug)]
pub struct UserNet;

impl UserNet {
    /// Starts a network; `wake` is called as `net::NetPort` says.
    pub fn start(
        config: UserNetConfig,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> Result<UserNetPort, UserNetError> {
        UserNetPort::start(config, wake)
    }
}
