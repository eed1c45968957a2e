//! From the spec's CPU model to the hypervisor's and back: one text, parsed in one place.

use alloc::string::{String, ToString};
use hypervisor::CpuModel;
use machine_spec::{CpuFeature, CpuSpec};

/// The model that `spec` names, which is written back with its version and every difference, so that a saved VM finds
/// the same processor when there are newer versions. The error is for people.
pub fn resolve(spec: &mut CpuSpec) -> Result<CpuModel, String> {
    let mut text = spec.model.clone();
    for feature in &spec.features {
        text.push_str(if feature.enabled { ",+" } else { ",-" });
        text.push_str(&feature.name);
    }
    let model = CpuModel::parse(&text).map_err(|error| error.to_string())?;
    let text = model.to_string();
    let mut parts = text.split(',');
    spec.model = parts.next().unwrap_or_default().into();
    let feature = |part: &str| CpuFeature { name: part[1..].into(), enabled: part.starts_with('+') };
    spec.features = parts.map(feature).collect();
    Ok(model)
}
