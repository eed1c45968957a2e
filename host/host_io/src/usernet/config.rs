//! How a person describes a user-mode network: `user[,hostfwd=tcp|udp:[ADDR]:PORT-[GUEST]:PORT]...[,hostloopback=on|off][,hostname=NAME]`.
//!
//! Called by: the command line and the vmm's spec. Invariants: what is not understood is refused with the field's name
//! and a form that works; a forward without a host address listens on 127.0.0.1 only.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::str::FromStr;

use super::UserNetError;
use super::addresses::{DNS, GATEWAY, GUEST, in_subnet};

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A port of the host that leads into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where the host listens. Port 0 takes a free one (see `UserNetPort::forwards`).
    pub host: SocketAddr,
    /// Where it leads.
    pub guest: SocketAddrV4,
}

/// Bounds on what one guest may make the host hold. Each flow is a descriptor, of which a process has 1024 by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// TCP connections at once. Each may buffer `TCP_BUFFER_BYTES` in each direction.
    pub tcp_flows: usize,
    /// UDP and ping flows at once; the longest idle one makes room.
    pub datagram_flows: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { tcp_flows: 400, datagram_flows: 200 }
    }
}

/// Where names are looked up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resolvers {
    /// What `/etc/resolv.conf` names; without any, names of `/etc/hosts` are answered.
    #[default]
    System,
    /// These; with an empty list, names of `/etc/hosts` are answered.
    Fixed(Vec<SocketAddr>),
}

/// A user-mode network for one guest NIC.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserNetConfig {
    /// Ports that lead in.
    pub forwards: Vec<Forward>,
    /// The guest reaches the host's loopback services at 10.0.2.2.
    pub host_loopback: bool,
    /// Given to the guest by DHCP.
    pub hostname: Option<String>,
    /// Bounds.
    pub limits: Limits,
    /// Where names are looked up.
    pub resolvers: Resolvers,
}

impl FromStr for UserNetConfig {
    type Err = UserNetError;

    fn from_str(text: &str) -> Result<UserNetConfig, UserNetError> {
        let fail = |field: &str, problem: &str| UserNetError::Config {
            text: text.into(),
            field: field.into(),
            problem: problem.into(),
        };
        let mut parts = text.split(',');
        if parts.next() != Some("user") {
            return Err(fail("kind", "a user-mode network is written user[,option...]"));
        }
        let mut config = UserNetConfig::default();
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            match (key, value) {
                ("hostfwd", _) => config.forwards.push(parse_forward(value).map_err(|p| fail(key, &p))?),
                ("hostloopback", "on") => config.host_loopback = true,
                ("hostloopback", "off") => config.host_loopback = false,
                ("hostloopback", _) => return Err(fail(key, "write hostloopback=on or hostloopback=off")),
                ("hostname", name) if is_host_name(name) => config.hostname = Some(name.into()),
                ("hostname", _) => {
                    return Err(fail(
                        key,
                        "a host name has 1 to 63 letters, digits and inner hyphens, as in hostname=vm1",
                    ));
                }
                _ => {
                    let known = "is not an option; known are hostfwd=tcp:127.0.0.1:2222-:22, hostloopback=on, hostname=NAME";
                    return Err(fail(key, known));
                }
            }
        }
        Ok(config)
    }
}

fn is_host_name(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// `tcp:[ADDR]:PORT-[GUEST]:PORT`, with an IPv6 host address in brackets.
fn parse_forward(text: &str) -> Result<Forward, String> {
    let example = "write it as tcp:127.0.0.1:2222-:22";
    let (protocol, rest) = text.split_once(':').ok_or(example)?;
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        other => return Err(format!("`{other}` is neither tcp nor udp; {example}")),
    };
    // The guest's side has no hyphen, a host address might.
    let (host, guest) =
        rest.rsplit_once('-').ok_or(format!("there is no `-` between host and guest; {example}"))?;
    let (host, port) = split_port(host).ok_or(format!("`{host}` has no valid host port; {example}"))?;
    let address: IpAddr = match host.trim_start_matches('[').trim_end_matches(']') {
        "" => Ipv4Addr::LOCALHOST.into(),
        host => host.parse().map_err(|_| format!("`{host}` is no IP address; {example}"))?,
    };
    let (guest, guest_port) =
        split_port(guest).ok_or(format!("`{guest}` has no valid guest port; {example}"))?;
    let guest: Ipv4Addr = match guest {
        "" => GUEST,
        guest => guest.parse().map_err(|_| format!("`{guest}` is no IPv4 address; {example}"))?,
    };
    if !in_subnet(guest) || guest == GATEWAY || guest == DNS || guest_port == 0 {
        return Err(format!("{guest}:{guest_port} is not in the guest's part of 10.0.2.0/24; {example}"));
    }
    let host = SocketAddr::new(address, port);
    Ok(Forward { protocol, host, guest: SocketAddrV4::new(guest, guest_port) })
}

fn split_port(text: &str) -> Option<(&str, u16)> {
    let (address, port) = text.rsplit_once(':')?;
    Some((address, port.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_form_parses() {
        let config: UserNetConfig =
            "user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp:[::1]:5353-10.0.2.20:53,hostfwd=tcp::8080-:80,hostloopback=on,hostname=vm1"
                .parse()
                .unwrap();
        let guest = |last, port| SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, last), port);
        assert_eq!(
            config.forwards,
            [
                Forward {
                    protocol: Protocol::Tcp,
                    host: "127.0.0.1:2222".parse().unwrap(),
                    guest: guest(15, 22)
                },
                Forward {
                    protocol: Protocol::Udp,
                    host: "[::1]:5353".parse().unwrap(),
                    guest: guest(20, 53)
                },
                Forward {
                    protocol: Protocol::Tcp,
                    host: "127.0.0.1:8080".parse().unwrap(),
                    guest: guest(15, 80)
                },
            ]
        );
        assert!(config.host_loopback);
        assert_eq!(config.hostname.as_deref(), Some("vm1"));
        assert_eq!("user".parse::<UserNetConfig>().unwrap(), UserNetConfig::default());
    }

    #[test]
    fn errors_name_the_field_and_the_way_out() {
        for (text, field, hint) in [
            ("tap", "kind", "user[,option...]"),
            ("user,hostfwd=2222", "hostfwd", "tcp:127.0.0.1:2222-:22"),
            ("user,hostfwd=sctp::1-:2", "hostfwd", "neither tcp nor udp"),
            ("user,hostfwd=tcp::1:2", "hostfwd", "no `-`"),
            ("user,hostfwd=tcp::70000-:2", "hostfwd", "no valid host port"),
            ("user,hostfwd=tcp:localhost:1-:2", "hostfwd", "no IP address"),
            ("user,hostfwd=tcp::1-:x", "hostfwd", "no valid guest port"),
            ("user,hostfwd=tcp::1-10.0.3.1:22", "hostfwd", "10.0.2.0/24"),
            ("user,hostfwd=tcp::1-10.0.2.2:22", "hostfwd", "guest's part"),
            ("user,hostloopback=yes", "hostloopback", "hostloopback=on"),
            ("user,hostname=-x", "hostname", "hostname=vm1"),
            ("user,restrict=on", "restrict", "known are"),
        ] {
            let error = text.parse::<UserNetConfig>().unwrap_err().to_string();
            assert!(
                error.contains(text) && error.contains(&format!("{field}: ")) && error.contains(hint),
                "{error}"
            );
        }
    }
}
