//! From the spec's CPU model to the hypervisor's: one text, parsed in one place.

use alloc::string::{String, ToString};
use hypervisor::CpuModel;
use machine_spec::CpuSpec;

/// The model that `spec` names; the error is for people.
pub fn resolve(spec: &CpuSpec) -> Result<CpuModel, String> {
    let mut text = spec.model.clone();
    for feature in &spec.features {
        text.push_str(if feature.enabled { ",+" } else { ",-" });
        text.push_str(&feature.name);
    }
    CpuModel::parse(&text).map_err(|error| error.to_string())
}
