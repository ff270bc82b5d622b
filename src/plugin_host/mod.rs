//! Optimizers and learning-rate schedules from shared libraries.
//!
//! A library that cannot be used is listed with the reason and stops nothing. A library is never unloaded: what it
//! has made may live as long as the process.

mod blocks;
mod folders;
mod lazy;
mod library;
mod names;
mod optimizer;
mod schedule;
mod settings;
mod tensors;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::training::optimizer::{LrScheduler, Optimizer, OptimizerError};
use library::{Library, OptimizerType, ScheduleType};

/// Why a schedule has no factor.
pub use crate::training::optimizer::OptimizerError as ScheduleError;
pub use lazy::{Probed, probe};
pub use settings::SettingError;

/// Version of the plugin ABI that this program speaks: major, minor.
pub const ABI_VERSION: (u32, u32) = (lorasmith_abi::ABI_MAJOR, lorasmith_abi::ABI_MINOR);

/// Two f32 for each element, as Adam has: what is reckoned with where an optimizer says nothing.
const DEFAULT_STATE_BYTES: f64 = 8.0;

/// Where plugins are looked for, and which may be loaded.
#[derive(Clone, Debug, Default)]
pub struct PluginFolders {
    /// Folders that the operator has configured; the program's own comes after them.
    pub folders: Vec<PathBuf>,
    /// SHA-256 digests of the files that may be loaded, in hex; all when absent.
    pub allowed_sha256: Option<Vec<String>>,
}

/// What became of a plugin file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PluginStatus {
    /// Its components can be used.
    Loaded,
    /// It is not used.
    Refused,
}

/// A plugin file that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginInfo {
    /// The file, or a folder that was refused as a whole.
    pub path: PathBuf,
    /// Loaded or refused.
    pub status: PluginStatus,
    /// Why it was refused.
    pub reason: Option<String>,
    /// Digest of the file.
    pub sha256: Option<String>,
    /// The plugin's id.
    pub id: Option<String>,
    /// Its version.
    pub version: Option<String>,
    /// Its license, an SPDX expression.
    pub license: Option<String>,
    /// The ABI it was built for: major, minor.
    pub abi: Option<(u32, u32)>,
    /// Ids of its optimizers.
    pub optimizers: Vec<String>,
    /// Ids of its schedulers.
    pub schedulers: Vec<String>,
}

/// An optimizer or a scheduler that can be used.
#[derive(Clone, Debug, PartialEq)]
pub struct ComponentInfo {
    /// Its id.
    pub id: String,
    /// Other names under which a run may choose it.
    pub aliases: Vec<&'static str>,
    /// One sentence.
    pub summary: String,
    /// The plugin that brings it.
    pub plugin_id: String,
    /// That plugin's version.
    pub plugin_version: String,
    /// JSON Schema of its settings.
    pub settings_schema: Value,
    /// Whether each element's update depends on that element alone; false for schedulers.
    pub elementwise: bool,
    /// Bytes of state for each trained element, as its schema says; 8 where it does not, 0 for schedulers.
    pub state_bytes_per_element: f64,
}

/// The plugins of this process.
pub struct PluginHost {
    plugins: Vec<PluginInfo>,
    optimizers: Vec<OptimizerType>,
    schedules: Vec<ScheduleType>,
}

impl PluginHost {
    /// Loads every plugin of the configured folders and of the program's own, in that order. Never fails.
    pub fn discover(folders: &PluginFolders) -> Self {
        let mut host = Self {
            plugins: Vec::new(),
            optimizers: Vec::new(),
            schedules: Vec::new(),
        };
        let mut seen = HashSet::new();
        for candidate in folders::candidates(&folders.folders) {
            let (path, checked) = match candidate {
                Ok(path) => {
                    let checked = folders::check(&path, folders.allowed_sha256.as_deref());
                    (path, checked)
                }
                Err(refused) => {
                    host.refuse(refused.path, None, refused.reason);
                    continue;
                }
            };
            match checked {
                Ok(sha256) => {
                    // The same file in two folders is no mistake: a build leaves copies.
                    if seen.insert(sha256.clone()) {
                        host.load(&path, sha256);
                    }
                }
                Err((sha256, reason)) => host.refuse(path, sha256, reason),
            }
        }
        host
    }

    /// Every plugin file that was found.
    pub fn plugins(&self) -> &[PluginInfo] {
        &self.plugins
    }

    /// The optimizers that can be used.
    pub fn optimizers(&self) -> Vec<ComponentInfo> {
        self.optimizers
            .iter()
            .map(|known| known.info.clone())
            .collect()
    }

    /// The schedulers that can be used.
    pub fn schedulers(&self) -> Vec<ComponentInfo> {
        self.schedules
            .iter()
            .map(|known| known.info.clone())
            .collect()
    }

    /// Whether an optimizer takes these settings.
    ///
    /// # Errors
    /// Every wrong value; one without a pointer when no plugin offers the optimizer.
    pub fn check_optimizer_settings(
        &self,
        id: &str,
        settings: &Value,
    ) -> Result<(), Vec<SettingError>> {
        match self.optimizer(id) {
            Some(known) => settings::check(&known.validator, &known.info.settings_schema, settings),
            None => Err(vec![self.unknown("optimizer", id, &self.optimizers())]),
        }
    }

    /// Whether a scheduler takes these settings.
    ///
    /// # Errors
    /// As for optimizers.
    pub fn check_scheduler_settings(
        &self,
        id: &str,
        settings: &Value,
    ) -> Result<(), Vec<SettingError>> {
        match self.schedule(id) {
            Some(known) => settings::check(&known.validator, &known.info.settings_schema, settings),
            None => Err(vec![self.unknown("scheduler", id, &self.schedulers())]),
        }
    }

    /// Makes an optimizer for a run.
    ///
    /// # Errors
    /// When no plugin offers it, or the plugin does not take the settings.
    pub fn create_optimizer(
        &self,
        id: &str,
        settings: &Value,
    ) -> Result<Box<dyn Optimizer>, OptimizerError> {
        self.check_optimizer_settings(id, settings).map_err(first)?;
        let known = self
            .optimizer(id)
            .ok_or_else(|| OptimizerError(format!("no optimizer `{id}`")))?;
        let instance = known
            .create(&settings.to_string())
            .map_err(OptimizerError)?;
        Ok(Box::new(optimizer::PluginOptimizer::new(id, instance)))
    }

    /// Makes a scheduler for a run.
    ///
    /// # Errors
    /// When no plugin offers it, or the plugin does not take the settings or the run's length.
    pub fn create_scheduler(
        &self,
        id: &str,
        settings: &Value,
        base_lr: f64,
        warmup_steps: u64,
        total_steps: u64,
    ) -> Result<Box<dyn LrScheduler>, OptimizerError> {
        self.check_scheduler_settings(id, settings).map_err(first)?;
        let known = self
            .schedule(id)
            .ok_or_else(|| OptimizerError(format!("no scheduler `{id}`")))?;
        let instance = known
            .create(&settings.to_string(), base_lr, warmup_steps, total_steps)
            .map_err(OptimizerError)?;
        Ok(Box::new(schedule::PluginSchedule::new(id, instance)))
    }

    /// The optimizer's own id, where `name` is another name of it, such as `AdamW8bit` of sd-scripts.
    pub fn optimizer_id(&self, name: &str) -> Option<&str> {
        Some(&self.optimizer(name)?.info.id)
    }

    /// Bytes of state that an optimizer keeps for each trained element, as its plugin says.
    pub fn state_bytes_per_element(&self, optimizer: &str) -> f64 {
        self.optimizer(optimizer)
            .map_or(DEFAULT_STATE_BYTES, |known| {
                known.info.state_bytes_per_element
            })
    }

    /// The schedule's own id, whatever the capitals and dashes of `name`.
    pub fn scheduler_id(&self, name: &str) -> Option<&str> {
        Some(&self.schedule(name)?.info.id)
    }

    fn optimizer(&self, name: &str) -> Option<&OptimizerType> {
        let ids = self.optimizers.iter().map(|known| known.info.id.as_str());
        let id = names::canonical(name, ids)?;
        self.optimizers.iter().find(|known| known.info.id == id)
    }

    fn schedule(&self, name: &str) -> Option<&ScheduleType> {
        let ids = self.schedules.iter().map(|known| known.info.id.as_str());
        let id = names::canonical(name, ids)?;
        self.schedules.iter().find(|known| known.info.id == id)
    }

    fn unknown(&self, kind: &str, id: &str, known: &[ComponentInfo]) -> SettingError {
        let ids: Vec<&str> = known.iter().map(|info| info.id.as_str()).collect();
        let refused = self
            .plugins
            .iter()
            .filter(|plugin| plugin.status == PluginStatus::Refused);
        let hint = match refused.count() {
            0 => String::new(),
            count => format!("; {count} plugins were refused, GET /v1/plugins says why"),
        };
        let advice = match names::nearest(id, ids.iter().copied()) {
            Some(near) => format!("did you mean `{near}`? Expected"),
            None => "expected".to_owned(),
        };
        let message = format!(
            "no loaded plugin offers the {kind} `{id}`; {advice} one of: {}{hint}",
            ids.join(", ")
        );
        SettingError {
            pointer: None,
            message,
        }
    }

    fn load(&mut self, path: &Path, sha256: String) {
        match Library::open(path).and_then(|library| self.adopt(path, &sha256, library)) {
            Ok(()) => {}
            Err(reason) => self.refuse(path.to_owned(), Some(sha256), reason),
        }
    }

    fn adopt(&mut self, path: &Path, sha256: &str, library: Library) -> Result<(), String> {
        let ids = |plugin: &PluginInfo| plugin.id.clone();
        if let Some(id) = self
            .plugins
            .iter()
            .filter_map(ids)
            .find(|id| *id == library.id)
        {
            return Err(format!("duplicate plugin id `{id}`"));
        }
        for new in &library.optimizers {
            if self
                .optimizers
                .iter()
                .any(|known| known.info.id == new.info.id)
            {
                return Err(format!("duplicate optimizer id `{}`", new.info.id));
            }
        }
        for new in &library.schedules {
            if self
                .schedules
                .iter()
                .any(|known| known.info.id == new.info.id)
            {
                return Err(format!("duplicate scheduler id `{}`", new.info.id));
            }
        }
        self.plugins.push(PluginInfo {
            path: path.to_owned(),
            status: PluginStatus::Loaded,
            reason: None,
            sha256: Some(sha256.to_owned()),
            id: Some(library.id),
            version: Some(library.version),
            license: Some(library.license),
            abi: Some(library.abi),
            optimizers: library
                .optimizers
                .iter()
                .map(|new| new.info.id.clone())
                .collect(),
            schedulers: library
                .schedules
                .iter()
                .map(|new| new.info.id.clone())
                .collect(),
        });
        self.optimizers.extend(library.optimizers);
        self.schedules.extend(library.schedules);
        Ok(())
    }

    fn refuse(&mut self, path: PathBuf, sha256: Option<String>, reason: String) {
        self.plugins.push(PluginInfo {
            path,
            status: PluginStatus::Refused,
            reason: Some(reason),
            sha256,
            id: None,
            version: None,
            license: None,
            abi: None,
            optimizers: Vec::new(),
            schedulers: Vec::new(),
        });
    }
}

fn first(errors: Vec<SettingError>) -> OptimizerError {
    let text = errors.into_iter().next().map(|error| match error.pointer {
        Some(pointer) => format!("settings{pointer}: {}", error.message),
        None => error.message,
    });
    OptimizerError(text.unwrap_or_default())
}
