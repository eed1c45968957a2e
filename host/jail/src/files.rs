//! Which files a thread can still open by name (landlock, `Documentation/userspace-api/landlock.rst`).
//!
//! Called by: `enter`. What is open already stays usable.

use crate::{FileUse, JailError, Thread};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr,
};

/// The newest rights that are known here; an older kernel has fewer.
const RIGHTS: ABI = ABI::V5;

/// The rules of a thread. A file that is not there needs no rule.
pub fn rules(thread: Thread, files: &[FileUse]) -> Result<RulesetCreated, JailError> {
    let mut rules = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    rules = rules.handle_access(AccessFs::from_all(RIGHTS))?;
    if thread != Thread::Network {
        rules = rules.handle_access(AccessNet::from_all(RIGHTS))?;
    }
    let mut rules = rules.create()?;
    for file in files {
        let (path, right) = match file {
            FileUse::Read(path) => (path, AccessFs::ReadFile),
            FileUse::RemoveIn(path) => (path, AccessFs::RemoveFile),
        };
        if let Ok(fd) = PathFd::new(path) {
            rules = rules.add_rule(PathBeneath::new(fd, right))?;
        }
    }
    Ok(rules)
}
