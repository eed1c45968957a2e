//! Whom the threads work for: root becomes a user without a name, capabilities go.
//!
//! Called by: `enter`. Each thread changes itself: Linux keeps credentials by thread, and those that run already would
//! have to allow the calls of a change from outside.

use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};
use std::io;

/// A VM's user is this and the process's number: nobody else's, and in a range that systemd's list of users and groups
/// (UIDS-GIDS) leaves unused.
const FIRST: u32 = 0x7100_0000;
/// Where a namespace has no such users.
const NOBODY: u32 = 65_534;

/// Whether root can become somebody else; `None` for others, who stay who they are.
pub fn root_can_leave() -> Option<bool> {
    if !rustix::process::geteuid().is_root() && !rustix::process::getuid().is_root() {
        return None;
    }
    let needed = CapabilitySet::SETUID | CapabilitySet::SETGID;
    let may = rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(needed));
    let there = |map| std::fs::read_to_string(map).is_ok_and(|map| has(&map, own()) || has(&map, NOBODY));
    Some(may && there("/proc/self/uid_map") && there("/proc/self/gid_map"))
}

/// Whether a namespace with this map (user_namespaces(7): first inside, first outside, how many) has the user or group `id`.
fn has(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        matches!(numbers[..], [first, _, count] if (first..first + count).contains(&id.into()))
    })
}

fn own() -> u32 {
    FIRST + (std::process::id() & 0x00FF_FFFF)
}

/// The calling thread works for a user of this process's own from now on.
pub fn leave_root() -> io::Result<()> {
    // A namespace may forbid it; its root has the groups of who made it.
    let _ = rustix::thread::set_thread_groups(&[]);
    match become_user(own()) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => become_user(NOBODY),
        done => done,
    }
}

fn become_user(id: u32) -> io::Result<()> {
    let (user, group) = (Some(Uid::from_raw(id)), Some(Gid::from_raw(id)));
    rustix::thread::set_thread_res_gid(group, group, group)?;
    Ok(rustix::thread::set_thread_res_uid(user, user, user)?)
}

/// The calling thread gives up its capabilities.
pub fn drop_capabilities() -> io::Result<()> {
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_of_one_user_has_no_other() {
        assert!(!has("         0       1000          1\n", NOBODY));
        assert!(has("0 100000 65536\n", NOBODY) && !has("0 100000 65536\n", FIRST));
        assert!(has("0 0 4294967295\n", FIRST));
        assert!(!has("nonsense\n", 0));
    }
}
