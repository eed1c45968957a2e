//! CPU models: what CPUID says, by name and version, never what the host has.
//!
//! A model is written `NAME[@VERSION][,+FEATURE][,-FEATURE]...`, for example `x86-64-v3,+pcid,-aes`. A
//! released (name, version) never changes its features: a saved VM finds the same processor everywhere.
//!
//! What every model looks like, and why: vendor `GenuineIntel`, family 6, model 0x9F.
//! - Intel's vendor string, because Linux then honours ARCH_CAPABILITIES (RDCL_NO and its like, see
//!   `x86_defs::msr`) and needs none of AMD's MSRs (HWCR, DE_CFG, SYSCFG, topology), some of which it
//!   reads without a fault handler.
//! - Family 6, because kernels and C libraries take fast string instructions for granted there.
//! - `bhi-ctrl` besides BHI_NO, because newer kernels clear the branch history in a loop at each system call of
//!   every guest on an Intel processor, whatever BHI_NO says, unless SPEC_CTRL.BHI_DIS_S exists. An engine whose
//!   hardware lacks it stores the bit.
//! - Model 0x9F is no processor's. Programs pick code by family and model alone (GCC's `target_clones("arch=...")`
//!   and `__builtin_cpu_is` look at no feature bit), so a real number would promise all that its processor has;
//!   Sapphire Rapids' made stress-ng run AVX-512. It stands in no kernel's list of errata either. Intel counts
//!   new processors in families 18 and 19.

mod cpuid;
mod models;

pub use cpuid::CpuidContext;

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use x86_defs::cpuid::{Feature, FeatureSet};

/// What a VM's processors are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuModel {
    /// Features that CPUID shows and instructions may use.
    pub features: FeatureSet,
    name: &'static str,
    version: u32,
    /// Features of the named model before `+` and `-`.
    base: FeatureSet,
}

/// Why a CPU model cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuModelError {
    /// No model of that name.
    #[error("no CPU model is called `{name}`; choose one of: {choices}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// The names that there are.
        choices: String,
    },
    /// The model has no such version.
    #[error("CPU model `{name}` has no version `{version}`; its newest is {newest}")]
    Version {
        /// The model.
        name: &'static str,
        /// What was asked for.
        version: String,
        /// Its newest version.
        newest: u32,
    },
    /// No feature of that name.
    #[error("no CPU feature is called `{name}`; choose from: {choices}")]
    UnknownFeature {
        /// What was asked for.
        name: String,
        /// The names that there are.
        choices: String,
    },
    /// Neither `+feature` nor `-feature`.
    #[error("`{0}` in a CPU model: write +feature or -feature")]
    Sign(String),
    /// A feature that every model has.
    #[error("the CPU feature `{0}` cannot be taken away")]
    Fixed(&'static str),
}

impl CpuModel {
    /// The model that `text` describes.
    pub fn parse(text: &str) -> Result<Self, CpuModelError> {
        let mut parts = text.split(',').map(str::trim);
        let mut model = Self::named(parts.next().unwrap_or_default())?;
        for part in parts {
            if let Some(name) = part.strip_prefix('+') {
                model.add(feature(name)?);
            } else if let Some(name) = part.strip_prefix('-') {
                model.remove(feature(name)?)?;
            } else {
                return Err(CpuModelError::Sign(part.into()));
            }
        }
        Ok(model)
    }

    /// The model `max`: all that the interpreter implements.
    pub fn max() -> Self {
        Self::of(models::newest(&models::MAX))
    }

    /// Names of the models.
    pub fn names() -> impl Iterator<Item = &'static str> {
        models::ALL.iter().map(|versions| versions[0].name)
    }

    fn named(text: &str) -> Result<Self, CpuModelError> {
        let (name, version) = text.split_once('@').map_or((text, None), |(n, v)| (n, Some(v)));
        let Some(versions) = models::ALL.iter().find(|v| v[0].name == name) else {
            let choices = Self::names().collect::<Vec<_>>().join(", ");
            return Err(CpuModelError::Unknown { name: name.into(), choices });
        };
        let newest = models::newest(versions);
        let Some(version) = version else { return Ok(Self::of(newest)) };
        let found = version.parse().ok().and_then(|n: u32| versions.iter().find(|m| m.version == n));
        found.map(Self::of).ok_or_else(|| CpuModelError::Version {
            name: newest.name,
            version: version.into(),
            newest: newest.version,
        })
    }

    fn of(model: &models::Model) -> Self {
        let base = model.features();
        Self { features: base, name: model.name, version: model.version, base }
    }

    /// Adds `feature` and what it needs.
    fn add(&mut self, feature: Feature) {
        self.features.insert(feature);
        for (_, needed) in models::NEEDS.iter().filter(|(f, _)| *f == feature) {
            if !self.features.has(*needed) {
                self.add(*needed);
            }
        }
    }

    /// Removes `feature` and what needs it. An error if every model has it.
    pub fn remove(&mut self, feature: Feature) -> Result<(), CpuModelError> {
        if models::FIXED.contains(&feature) {
            return Err(CpuModelError::Fixed(feature.name()));
        }
        self.features.remove(feature);
        for (dependent, _) in models::NEEDS.iter().filter(|(_, needed)| *needed == feature) {
            if self.features.has(*dependent) {
                self.remove(*dependent)?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for CpuModel {
    /// With version and every difference: [`CpuModel::parse`] gives the same model back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name, self.version)?;
        for feature in self.base.missing_from(self.features).iter() {
            write!(f, ",+{}", feature.name())?;
        }
        for feature in self.features.missing_from(self.base).iter() {
            write!(f, ",-{}", feature.name())?;
        }
        Ok(())
    }
}

fn feature(name: &str) -> Result<Feature, CpuModelError> {
    Feature::ALL.iter().copied().find(|f| f.name() == name).ok_or_else(|| CpuModelError::UnknownFeature {
        name: name.to_string(),
        choices: list(models::MAX[0].features()),
    })
}

fn list(features: FeatureSet) -> String {
    features.iter().map(Feature::name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
