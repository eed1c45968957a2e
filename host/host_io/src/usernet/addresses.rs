//! The addresses of the user-mode network, as people know them from QEMU, and what a guest may reach through it.
//!
//! Called by: every part of `usernet`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};

use smoltcp::wire::EthernetAddress;

/// The gateway, and the host as the guest sees it.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server.
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// What DHCP gives to the guest.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The netmask of the subnet.
pub const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// Directed broadcast of the subnet.
pub const BROADCAST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 255);
/// Port of the name service.
pub const DNS_PORT: u16 = 53;
/// Largest IP packet on the link.
pub const MTU: u16 = 1500;

/// The hardware address of everything that is not the guest (gateway and name server).
pub(super) const OUR_MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 0x0a, 0x00, 0x02, 0x02]);

/// Whether an address lies in 10.0.2.0/24.
pub(super) fn in_subnet(address: Ipv4Addr) -> bool {
    address.octets()[..3] == GATEWAY.octets()[..3]
}

/// Whether an address can be a guest's: in the subnet, and not ours.
pub(super) fn can_be_guest(address: Ipv4Addr) -> bool {
    in_subnet(address) && ![GATEWAY, DNS, BROADCAST].contains(&address) && address.octets()[3] != 0
}

/// Where a packet of the guest goes in the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// To this address of the host's network.
    Outside(SocketAddr),
    /// To the host's name servers.
    NameServer,
    /// Nobody serves that port here: RST, or ICMP port unreachable.
    Closed,
    /// There is no such neighbour: ICMP host unreachable.
    NoHost,
    /// Not allowed: ICMP administratively prohibited.
    Prohibited,
    /// Broadcast and multicast end here.
    Ignored,
}

/// Decides about a destination. The host's loopback is reachable at 10.0.2.2 only, and only with `host_loopback`.
/// Link-local addresses (169.254/16) are never forwarded (RFC 3927 §7): cloud hosts keep credentials behind them.
pub(super) fn route(to: SocketAddrV4, host_loopback: bool) -> Route {
    let address = *to.ip();
    let octets = address.octets();
    match address {
        GATEWAY if host_loopback => {
            Route::Outside(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), to.port()))
        }
        GATEWAY => Route::Closed,
        DNS if to.port() == DNS_PORT => Route::NameServer,
        DNS => Route::Closed,
        BROADCAST | Ipv4Addr::BROADCAST => Route::Ignored,
        _ if address.is_multicast() => Route::Ignored,
        _ if in_subnet(address) => Route::NoHost,
        _ if octets[0] == 0 || octets[0] >= 240 || address.is_loopback() || address.is_link_local() => {
            Route::Prohibited
        }
        _ if to.port() == 0 => Route::Closed,
        _ => Route::Outside(to.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_loopback_and_link_local_stay_out_of_reach() {
        let to = |text: &str, loopback| route(text.parse().unwrap(), loopback);
        for loopback in [false, true] {
            for inside in [
                "127.0.0.1:22",
                "127.9.9.9:22",
                "0.0.0.0:22",
                "169.254.169.254:80",
                "255.0.0.1:1",
                "240.0.0.1:1",
            ] {
                assert_eq!(to(inside, loopback), Route::Prohibited, "{inside}");
            }
            for ignored in ["255.255.255.255:67", "10.0.2.255:137", "224.0.0.251:5353"] {
                assert_eq!(to(ignored, loopback), Route::Ignored, "{ignored}");
            }
            assert_eq!(to("10.0.2.3:53", loopback), Route::NameServer);
            assert_eq!(to("10.0.2.3:80", loopback), Route::Closed);
            assert_eq!(to("10.0.2.77:80", loopback), Route::NoHost);
            assert_eq!(to("192.0.2.1:80", loopback), Route::Outside("192.0.2.1:80".parse().unwrap()));
        }
        assert_eq!(to("10.0.2.2:80", false), Route::Closed);
        assert_eq!(to("10.0.2.2:80", true), Route::Outside("127.0.0.1:80".parse().unwrap()));
    }
}
