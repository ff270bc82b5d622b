//! What a worker finds around it when it begins: program, device, base model, plugins. Written down before the first
//! step, so that it is known of runs that fail, too.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::spec::RunSpec;
use crate::diffusion::devices::{AdapterClass, DeviceInfo};
use crate::diffusion::{Family, Layout, PredictionType, instruction_set};
use crate::models::{BaseModel, ModelCatalog, ModelDigest, ModelFile, Vae};
use crate::plugin_host::{PluginHost, PluginInfo, PluginStatus};
use crate::training::{ComputePrecision, PluginChoice};

/// The commit that the program was built from, where whoever built it has said so.
const COMMIT: Option<&str> = option_env!("LORASMITH_COMMIT");

/// What a worker has found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// What it computes with.
    pub environment: Environment,
    /// What it computes on.
    pub materials: Materials,
    /// Digest of all that decides the result.
    pub inputs_sha256: String,
    /// The resume point that it goes on from.
    pub from_step: Option<u64>,
}

/// What a worker computes with. Between two environments that differ the last bits of a result may, too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Environment {
    /// Version of this program.
    pub program_version: String,
    /// The commit that it was built from, where that is known.
    pub commit: Option<String>,
    /// `release`, or `debug` where assertions are checked.
    pub build: String,
    /// Operating system.
    pub os: String,
    /// Processor architecture.
    pub arch: String,
    /// The device: `cpu`, `vulkan:0`.
    pub device: String,
    /// The device as its driver names it.
    pub device_name: String,
    /// Driver and its version; empty for the CPU.
    pub driver: String,
    /// On the CPU, what products are computed with: `amx`, `avx512`, `avx2`, `portable`.
    pub instructions: Option<String>,
    /// What the model multiplies in.
    pub precision: ComputePrecision,
    /// Threads of the machine. Results do not depend on their number.
    pub threads: usize,
}

/// What a run is computed on, besides its images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Materials {
    /// The base model.
    pub base_model: ModelRecord,
    /// The VAE in place of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vae: Option<VaeRecord>,
    /// Optimizer and scheduler.
    pub plugins: Vec<PluginRecord>,
}

/// A base model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelRecord {
    /// Its name.
    pub name: String,
    /// Its path below the model folder.
    pub path: String,
    /// Its generation.
    pub family: Option<Family>,
    /// How it is stored.
    pub layout: Option<Layout>,
    /// What its UNet predicts; `settings` may say otherwise.
    pub prediction_type: Option<PredictionType>,
    /// What tells its content apart: see [`ModelDigest`].
    pub sha256: String,
    /// Its files.
    pub files: Vec<ModelFile>,
}

/// A VAE in place of a base model's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaeRecord {
    /// Its name.
    pub name: String,
    /// Its path below the model folder.
    pub path: String,
    /// What tells its content apart: see [`ModelDigest`].
    pub sha256: String,
    /// Its files.
    pub files: Vec<ModelFile>,
}

/// A plugin that has done a part of the work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PluginRecord {
    /// `optimizer` or `scheduler`.
    pub role: String,
    /// What it was: `adamw`.
    pub id: String,
    /// The plugin that brings it.
    pub plugin_id: Option<String>,
    /// That plugin's version.
    pub version: Option<String>,
    /// Digest of its library.
    pub sha256: Option<String>,
    /// Its settings.
    pub settings: Value,
}

/// Something that is not as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Difference {
    /// What: a field of the environment, `losses`, or a file.
    pub what: String,
    /// How it was.
    pub before: Option<String>,
    /// How it is.
    pub now: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".to_owned());
        let (was, is) = (word(&self.before), word(&self.now));
        write!(f, "{} was {was} and is {is}", self.what)
    }
}

impl Environment {
    /// The environment of this process.
    pub fn of(device: &DeviceInfo, precision: ComputePrecision) -> Self {
        let is_cpu = device.class == AdapterClass::Cpu;
        let build = if cfg!(debug_assertions) {
            "debug"
        } else {
            "release"
        };
        Self {
            program_version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: COMMIT.map(str::to_owned),
            build: build.to_owned(),
            os: std::env::consts::OS.to_owned(),
            arch: std::env::consts::ARCH.to_owned(),
            device: device.id.clone(),
            // The CPU's own name tells its threads.
            device_name: if is_cpu {
                "CPU".to_owned()
            } else {
                device.name.clone()
            },
            driver: device.driver.clone(),
            instructions: is_cpu.then(|| instruction_set().to_owned()),
            precision,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// What may make the last bits of a result differ, by name.
    fn deciding(&self) -> BTreeMap<String, String> {
        let Ok(Value::Object(fields)) = serde_json::to_value(self) else {
            return BTreeMap::new(); // it is a struct
        };
        let words = fields.into_iter().filter_map(|(name, value)| match value {
            Value::Null => None,
            Value::String(text) => Some((name, text)),
            other => Some((name, other.to_string())),
        });
        words.filter(|(name, _)| name != "threads").collect()
    }

    /// In what `now` differs from what was before; several environments before are told together.
    pub fn differences(before: &[&Self], now: &Self) -> Vec<Difference> {
        let now = now.deciding();
        let before: Vec<_> = before.iter().map(|before| before.deciding()).collect();
        let mut names: Vec<&String> = before.iter().flat_map(BTreeMap::keys).collect();
        names.extend(now.keys());
        names.sort();
        names.dedup();
        let difference = |name: &String| {
            let mut values: Vec<&str> = before
                .iter()
                .map(|before| before.get(name).map_or("", String::as_str))
                .collect();
            values.dedup();
            let (was, is) = (values.join(", "), now.get(name).cloned());
            let some = |text: String| (!text.is_empty()).then_some(text);
            (was != is.clone().unwrap_or_default()).then(|| Difference {
                what: name.clone(),
                before: some(was),
                now: is,
            })
        };
        names.into_iter().filter_map(difference).collect()
    }
}

impl Materials {
    /// Looks at the base model and the plugins of a run; the first time the whole model is read.
    ///
    /// # Errors
    /// When the model's files cannot be read.
    pub fn find(
        models: &ModelCatalog,
        base: &BaseModel,
        vae: Option<&Vae>,
        plugins: &PluginHost,
        spec: &RunSpec,
    ) -> std::io::Result<Self> {
        let ModelDigest { sha256, files } = models.digest(&base.path)?;
        let vae = vae.map(|vae| {
            let ModelDigest { sha256, files } = models.digest(&vae.path)?;
            Ok::<_, std::io::Error>(VaeRecord {
                name: vae.name.clone(),
                path: models.below(&vae.path),
                sha256,
                files,
            })
        });
        let info = base.info.as_ref().ok();
        Ok(Self {
            base_model: ModelRecord {
                name: base.name.clone(),
                path: models.below(&base.path),
                family: info.map(|info| info.family),
                layout: info.map(|info| info.layout),
                prediction_type: info.map(|info| info.prediction),
                sha256,
                files,
            },
            vae: vae.transpose()?,
            plugins: plugin_records(plugins, spec),
        })
    }
}

/// The plugins that a run uses, as they are now.
pub fn plugin_records(host: &PluginHost, spec: &RunSpec) -> Vec<PluginRecord> {
    let record = |role: &str, choice: &PluginChoice, brings: fn(&PluginInfo) -> &[String]| {
        let loaded = host
            .plugins()
            .iter()
            .filter(|plugin| plugin.status == PluginStatus::Loaded);
        let found = loaded
            .into_iter()
            .find(|plugin| brings(plugin).contains(&choice.id));
        PluginRecord {
            role: role.to_owned(),
            id: choice.id.clone(),
            plugin_id: found.and_then(|plugin| plugin.id.clone()),
            version: found.and_then(|plugin| plugin.version.clone()),
            sha256: found.and_then(|plugin| plugin.sha256.clone()),
            settings: choice.settings.clone(),
        }
    };
    let settings = &spec.settings;
    vec![
        record("optimizer", &settings.optimizer, |plugin| {
            &plugin.optimizers
        }),
        record("scheduler", &settings.scheduler, |plugin| {
            &plugin.schedulers
        }),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::devices::{self, DeviceSpec};

    #[test]
    fn environments_differ_in_what_decides_bits() {
        let cpu = devices::open(DeviceSpec::Cpu).expect("the CPU").info;
        let one = Environment::of(&cpu, ComputePrecision::Fp32);
        let more = Environment {
            threads: one.threads + 1,
            ..one.clone()
        };
        assert_eq!(Environment::differences(&[&one], &more), []);
        let other = Environment {
            instructions: Some("none".to_owned()),
            commit: Some("abc".to_owned()),
            ..one.clone()
        };
        let found = Environment::differences(&[&one, &one, &other], &other);
        let names: Vec<&str> = found.iter().map(|found| found.what.as_str()).collect();
        assert_eq!(names, ["commit", "instructions"]);
        let both = format!("{}, none", one.instructions.expect("the CPU's"));
        assert_eq!(found[1].before, Some(both));
        assert_eq!(found[1].now.as_deref(), Some("none"));
    }
}
