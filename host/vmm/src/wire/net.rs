//! A network card: `user[,hostfwd=PROTO:[ADDR]:PORT-[ADDR]:PORT]...[,hostloopback=on][,mac=…]` or `tap,ifname=…`.

use super::SpecError;
use serde::{Deserialize, Serialize};

/// What the card is plugged into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetKind {
    /// Address translation in this process: needs no privilege.
    #[default]
    User,
    /// A TAP interface of the host.
    Tap,
}

/// See the module's header.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// What it is plugged into.
    pub kind: NetKind,
    /// The card's address; left out, one is derived from the VM's name and the card's number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Ports of the host that lead into the guest, as in `tcp:127.0.0.1:2222-:22`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hostfwd: Vec<String>,
    /// The guest may reach the host's loopback (through the gateway's address).
    #[serde(default, skip_serializing_if = "super::is_false")]
    pub hostloopback: bool,
    /// TAP interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ifname: Option<String>,
}

impl NetSpec {
    /// From the command line.
    pub fn from_option(text: &str) -> Result<Self, SpecError> {
        let wrong = |way_out: &str| SpecError::field("net", text, way_out);
        let mut parts = text.split(',');
        let kind = match parts.next() {
            Some("user") => NetKind::User,
            Some("tap") => NetKind::Tap,
            _ => return Err(wrong("start with user or tap, as in user,hostfwd=tcp:127.0.0.1:2222-:22")),
        };
        let mut spec = Self { kind, ..Self::default() };
        for part in parts {
            match part.split_once('=') {
                Some(("hostfwd", value)) => spec.hostfwd.push(value.into()),
                Some(("hostloopback", "on")) => spec.hostloopback = true,
                Some(("hostloopback", "off")) => spec.hostloopback = false,
                Some(("mac", value)) => spec.mac = Some(value.into()),
                Some(("ifname", value)) => spec.ifname = Some(value.into()),
                _ => {
                    let known = "known options are hostfwd=PROTO:[ADDR]:PORT-[ADDR]:PORT, hostloopback=on|off, mac=…, ifname=…";
                    return Err(SpecError::field("net", part, known));
                }
            }
        }
        Ok(spec)
    }

    /// Checks what can be checked without opening anything.
    pub fn check(&self) -> Result<(), SpecError> {
        if let Some(mac) = &self.mac {
            parse_mac(mac)?;
        }
        if self.kind == NetKind::User {
            let checked = crate::network::user_config(self);
            checked.map_err(|error| SpecError::field("net", "user", error.to_string()))?;
        }
        match self.kind {
            NetKind::User if self.ifname.is_some() => Err(SpecError::field(
                "net.ifname",
                self.ifname.as_deref().unwrap_or_default(),
                "belongs to kind tap",
            )),
            NetKind::Tap if self.ifname.is_none() => {
                Err(SpecError::field("net.ifname", "", "name the interface, as in tap,ifname=tap0"))
            }
            NetKind::Tap if !self.hostfwd.is_empty() || self.hostloopback => {
                Err(SpecError::field("net.hostfwd", self.hostfwd.join(" "), "belongs to kind user"))
            }
            _ => Ok(()),
        }
    }

    /// The card's address: the one asked for, or a locally administered one that stays the same for `vm` and `index`.
    pub fn mac_address(&self, vm: &str, index: usize) -> Result<[u8; 6], SpecError> {
        if let Some(mac) = &self.mac {
            return parse_mac(mac);
        }
        // FNV-1a: stable for ever.
        let hash = vm.bytes().chain(index.to_le_bytes()).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let [a, b, c, ..] = hash.to_be_bytes();
        Ok([0x52, 0x54, 0x00, a, b, c])
    }
}

/// Six bytes in hexadecimal; a card's own address is neither zero nor for groups.
fn parse_mac(text: &str) -> Result<[u8; 6], SpecError> {
    let wrong = |way_out: &str| SpecError::field("net.mac", text, way_out);
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2);
        *byte = part
            .and_then(|p| u8::from_str_radix(p, 16).ok())
            .ok_or_else(|| wrong("write six bytes, as in 52:54:00:12:34:56"))?;
    }
    if parts.next().is_some() {
        return Err(wrong("write six bytes, as in 52:54:00:12:34:56"));
    }
    if mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(wrong("the first byte must be even and the address not zero"));
    }
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_understood() {
        let net =
            NetSpec::from_option("user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::53-:53,hostloopback=on")
                .unwrap();
        assert_eq!(net.hostfwd, ["tcp:127.0.0.1:2222-:22", "udp::53-:53"]);
        assert!(net.hostloopback);
        assert_eq!(net.mac_address("vm", 0).unwrap(), net.mac_address("vm", 0).unwrap());
        assert_ne!(net.mac_address("vm", 0).unwrap(), net.mac_address("vm", 1).unwrap());
        let tap = NetSpec::from_option("tap,ifname=tap0,mac=52:54:00:00:00:01").unwrap();
        tap.check().unwrap();
        assert_eq!(tap.mac_address("", 0).unwrap()[5], 1);
    }

    #[test]
    fn nonsense_is_refused_with_the_field() {
        for text in ["", "bridge", "user,dhcp=off", "user,hostloopback=maybe"] {
            let error = NetSpec::from_option(text).unwrap_err().to_string();
            assert!(error.starts_with("net = "), "{error}");
        }
        for text in [
            "tap",
            "user,ifname=x",
            "user,mac=1",
            "user,mac=01:00:00:00:00:00",
            "user,mac=52:54:00:00:00:01:02",
        ] {
            assert!(NetSpec::from_option(text).unwrap().check().is_err(), "{text}");
        }
    }
}
