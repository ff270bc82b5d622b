//! `lorasmith lora`: looks into LoRA files, merges, resizes and renames them.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::cli::FamilyName;
use crate::lora_tools::base::layout_of_base;
use crate::lora_tools::resize::RuleName;
use crate::lora_tools::{
    AdapterFile, BaseMerge, Convention, Conversion, Ingredient, Inspection, Merge, Method,
    Progress, ResizeReport, Resizing, Rule, ToolError, Written, convert, inspect, merge,
    merge_into_base, resize,
};
use crate::networks::SavePrecision;

/// Most adapters that are listed one by one.
const LISTED: usize = 2000;

/// Flags of `lora`.
#[derive(Debug, Args)]
pub struct LoraArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: LoraCommand,
}

/// What can be done with LoRA files.
#[derive(Debug, Subcommand)]
pub enum LoraCommand {
    /// Tell what is in a LoRA file of any program: kind, ranks, norms, description, digests.
    Inspect {
        /// The file.
        file: PathBuf,
        /// List every adapter.
        #[arg(long)]
        modules: bool,
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Merge LoRA files into one: exactly, with the sum of the ranks, or down to a rank.
    Merge {
        /// The files, each with how much of it is taken: `a.safetensors:0.8`; 1 without.
        #[arg(required = true, value_name = "FILE[:STRENGTH]")]
        files: Vec<WeightedFile>,
        /// Where the result goes.
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// Rank of the result, by singular values; without, nothing is lost and ranks add up.
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
        rank: Option<u32>,
        /// Rank of convolutions larger than 1×1; by default the same.
        #[arg(long, requires = "rank", value_parser = clap::value_parser!(u32).range(1..=4096))]
        conv_rank: Option<u32>,
        /// Number format of the result; by default that of the first file.
        #[arg(long, value_enum)]
        precision: Option<PrecisionName>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Merge LoRA files into a copy of a base model: a single file, or a diffusers folder.
    MergeIntoBase {
        /// The base model.
        base: PathBuf,
        /// The LoRA files, each with how much of it is taken: `a.safetensors:0.8`; 1 without.
        #[arg(required = true, value_name = "FILE[:STRENGTH]")]
        files: Vec<WeightedFile>,
        /// Where the result goes: a file, or a folder that is not there yet.
        #[arg(short, long, value_name = "PATH")]
        output: PathBuf,
        /// Number format of the result; by default each tensor keeps its own.
        #[arg(long, value_enum)]
        precision: Option<PrecisionName>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Give a LoRA file other ranks, as sd-scripts' `resize_lora.py` does.
    Resize {
        /// The file.
        file: PathBuf,
        /// Where the result goes.
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// The new rank; with a method the largest one. 1024 by default with a method.
        #[arg(long, required_unless_present = "method", value_parser = clap::value_parser!(u32).range(1..=4096))]
        rank: Option<u32>,
        /// The rank of convolutions, 1×1 ones too; by default the same.
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
        conv_rank: Option<u32>,
        /// How the rank of each adapter is found: `sv_ratio`, `sv_cumulative` or `sv_fro`.
        #[arg(long, requires = "value")]
        method: Option<RuleName>,
        /// The method's number: a ratio of at least 2, or the part of the sum or of the norm that is kept.
        #[arg(long, requires = "method")]
        value: Option<f64>,
        /// Number format of the result; by default that of the file.
        #[arg(long, value_enum)]
        precision: Option<PrecisionName>,
        /// List what became of every adapter.
        #[arg(short, long)]
        verbose: bool,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write a LoRA file under the names of another program.
    Convert {
        /// The file.
        file: PathBuf,
        /// Whose names: sd-scripts' or those of diffusers and PEFT.
        #[arg(long, value_enum)]
        to: ConventionName,
        /// Where the result goes.
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// Generation of the base model, for a file that does not tell.
        #[arg(long, value_enum)]
        family: Option<FamilyName>,
        /// The base model, when its UNet has other blocks than the published ones.
        #[arg(long, value_name = "PATH", conflicts_with = "family")]
        base: Option<PathBuf>,
        /// Number format of the result; by default that of the file.
        #[arg(long, value_enum)]
        precision: Option<PrecisionName>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// A file and how much of it is taken.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightedFile {
    /// The file.
    pub path: PathBuf,
    /// 1 where nothing is said.
    pub strength: f64,
}

impl FromStr for WeightedFile {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let weighted = text.rsplit_once(':').and_then(|(path, strength)| {
            let strength = strength.parse().ok()?;
            (!path.is_empty()).then(|| Self {
                path: PathBuf::from(path),
                strength,
            })
        });
        Ok(weighted.unwrap_or_else(|| Self {
            path: PathBuf::from(text),
            strength: 1.0,
        }))
    }
}

/// Number formats of files.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PrecisionName {
    /// 32-bit floats.
    Fp32,
    /// IEEE half precision.
    Fp16,
    /// bfloat16.
    Bf16,
}

impl From<PrecisionName> for SavePrecision {
    fn from(name: PrecisionName) -> Self {
        match name {
            PrecisionName::Fp32 => Self::Fp32,
            PrecisionName::Fp16 => Self::Fp16,
            PrecisionName::Bf16 => Self::Bf16,
        }
    }
}

/// Ways of naming adapters.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ConventionName {
    /// `lora_unet_….lora_down.weight`: sd-scripts, A1111, ComfyUI.
    Kohya,
    /// `unet.….lora_A.weight`: diffusers and PEFT.
    Diffusers,
}

/// Does what the command says and returns what it prints.
///
/// # Errors
/// When a file cannot be read, worked on or written.
pub fn run(args: &LoraArgs) -> Result<String> {
    match &args.command {
        LoraCommand::Inspect {
            file,
            modules,
            json,
        } => {
            let found = inspect(file)?;
            if *json {
                return Ok(format!("{}\n", serde_json::to_string_pretty(&found)?));
            }
            Ok(table(&found, *modules))
        }
        LoraCommand::Merge {
            files,
            output,
            rank,
            conv_rank,
            precision,
            json,
        } => {
            let method = match rank {
                None => Method::Concatenate,
                Some(rank) => Method::Svd {
                    rank: *rank as usize,
                    conv_rank: conv_rank.unwrap_or(*rank) as usize,
                },
            };
            let wish = Merge {
                method,
                precision: precision.map(Into::into),
                title: stem(output),
            };
            let ingredients = open_all(files)?;
            timed(output, *json, |bar| merge(&ingredients, &wish, output, bar))
        }
        LoraCommand::MergeIntoBase {
            base,
            files,
            output,
            precision,
            json,
        } => {
            let wish = BaseMerge {
                precision: precision.map(Into::into),
            };
            let ingredients = open_all(files)?;
            timed(output, *json, |bar| {
                merge_into_base(base, &ingredients, &wish, output, bar)
            })
        }
        LoraCommand::Resize { .. } => run_resize(&args.command),
        LoraCommand::Convert { .. } => run_convert(&args.command),
    }
}

fn run_resize(command: &LoraCommand) -> Result<String> {
    let LoraCommand::Resize {
        file,
        output,
        rank,
        conv_rank,
        method,
        value,
        precision,
        verbose,
        json,
    } = command
    else {
        bail!("expected `resize`");
    };
    let rule = match (method, value) {
        (Some(method), Some(value)) => Rule::named(*method, *value)?,
        _ => Rule::Rank,
    };
    let wish = Resizing {
        rule,
        rank: rank.unwrap_or(1024) as usize,
        conv_rank: conv_rank.map(|rank| rank as usize),
        precision: precision.map(Into::into),
    };
    let file = AdapterFile::open_known(file)?;
    let mut bar = Bar::new(*json);
    let began = Instant::now();
    let report = resize(&file, &wish, output, &mut bar)?;
    if *json {
        return Ok(format!("{}\n", serde_json::to_string_pretty(&report)?));
    }
    let mut text = if *verbose {
        resized(&report, rule)
    } else {
        String::new()
    };
    text += &format!(
        "Average Frobenius norm retained: {:.2} % (standard deviation {:.3} %)\n",
        100.0 * report.fro_retained_mean,
        100.0 * report.fro_retained_std
    );
    let written = report.written(wish.precision);
    text += &summary(output, &written, began.elapsed().as_secs_f64());
    Ok(text)
}

fn run_convert(command: &LoraCommand) -> Result<String> {
    let LoraCommand::Convert {
        file,
        to,
        output,
        family,
        base,
        precision,
        json,
    } = command
    else {
        bail!("expected `convert`");
    };
    let told = base.as_deref().map(layout_of_base).transpose()?;
    let wish = Conversion {
        to: match to {
            ConventionName::Kohya => Convention::Kohya,
            ConventionName::Diffusers => Convention::Diffusers,
        },
        precision: precision.map(Into::into),
        family: family
            .map(Into::into)
            .or(told.as_ref().map(|(family, _)| *family)),
        layout: told.map(|(_, layout)| layout),
    };
    let file = AdapterFile::open_known(file)?;
    timed(output, *json, |bar| convert(&file, &wish, output, bar))
}

fn open_all(files: &[WeightedFile]) -> Result<Vec<Ingredient>, ToolError> {
    let open = |file: &WeightedFile| Ingredient::open(&file.path, file.strength);
    files.iter().map(open).collect()
}

fn stem(path: &std::path::Path) -> String {
    path.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn timed(
    output: &std::path::Path,
    json: bool,
    work: impl FnOnce(&mut dyn Progress) -> Result<Written, ToolError>,
) -> Result<String> {
    let mut bar = Bar::new(json);
    let began = Instant::now();
    let written = work(&mut bar)?;
    let seconds = began.elapsed().as_secs_f64();
    if json {
        let value = json!({
            "path": output, "size_bytes": written.size_bytes, "modules": written.modules,
            "precision": written.precision, "duration_s": seconds,
        });
        return Ok(format!("{}\n", serde_json::to_string_pretty(&value)?));
    }
    Ok(summary(output, &written, seconds))
}

fn summary(output: &std::path::Path, written: &Written, seconds: f64) -> String {
    format!(
        "{}: {} adapters, {:.1} MB, {seconds:.1} s\n",
        output.display(),
        written.modules,
        written.size_bytes as f64 / 1e6
    )
}

/// A bar on the terminal; nothing where there is none, or where JSON is printed.
struct Bar(ProgressBar);

impl Bar {
    fn new(quiet: bool) -> Self {
        let bar = ProgressBar::new(0);
        if quiet {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {elapsed} (still {eta})");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        Self(bar)
    }
}

impl Progress for Bar {
    fn total(&mut self, pieces: usize) {
        self.0.set_length(pieces as u64);
    }

    fn done(&mut self, pieces: usize) {
        self.0.inc(pieces as u64);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// One line for each adapter, with the reference's words.
fn resized(report: &ResizeReport, rule: Rule) -> String {
    let mut text = String::new();
    for module in report.modules.iter().take(LISTED) {
        // Writing to a String does not fail.
        let _ = write!(
            text,
            "{:75} | sum(S) retained: {:.1}%, fro retained: {:.1}%, max(S) ratio: {:.1}",
            module.name,
            100.0 * module.sum_retained,
            100.0 * module.fro_retained,
            module.max_ratio.unwrap_or(f64::INFINITY)
        );
        if rule.words().is_some() {
            let _ = write!(
                text,
                ", dynamic | dim: {}, alpha: {}",
                module.new_rank, module.new_alpha
            );
        }
        text.push('\n');
    }
    text
}

fn table(found: &Inspection, all: bool) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<16}{value}");
    };
    let norm = |norm: Option<f64>| norm.map_or_else(|| "-".to_owned(), |norm| format!("{norm:.4}"));
    line("kind", found.kinds.join(", "));
    line(
        "base",
        found
            .family
            .map_or_else(|| "unknown".to_owned(), |family| format!("{family:?}")),
    );
    line(
        "names",
        found
            .convention
            .map_or_else(|| "unknown".to_owned(), |names| format!("{names:?}")),
    );
    line("described by", found.described_by.join(", "));
    line("adapters", found.module_count.to_string());
    let dtypes = found
        .dtypes
        .iter()
        .map(|(dtype, count)| format!("{dtype} ({count} tensors)"));
    line("format", dtypes.collect::<Vec<_>>().join(", "));
    line("parameters", found.parameters.to_string());
    line("size", format!("{} bytes", found.size_bytes));
    line("sha256", found.sha256.clone());
    let matches = |told: Option<bool>| match told {
        Some(true) => "as the description says",
        Some(false) => "NOT what the description says",
        None => "not in the description",
    };
    let hashes = &found.hashes;
    line(
        "model hash",
        format!(
            "{} ({})",
            hashes.sshs_model_hash,
            matches(hashes.model_hash_matches)
        ),
    );
    line(
        "legacy hash",
        format!(
            "{} ({})",
            hashes.sshs_legacy_hash,
            matches(hashes.legacy_hash_matches)
        ),
    );
    for count in found.ranks.iter().take(20) {
        let rank = count
            .rank
            .map_or_else(|| "-".to_owned(), |rank| rank.to_string());
        let alpha = count
            .alpha
            .map_or_else(|| "none".to_owned(), |alpha| alpha.to_string());
        line(
            "rank",
            format!(
                "{rank}, alpha {alpha}: {} adapters ({})",
                count.modules, count.kind
            ),
        );
    }
    line(
        "norms",
        format!(
            "mean {}, max {}",
            norm(found.norms.mean),
            norm(found.norms.max)
        ),
    );
    let _ = writeln!(
        text,
        "\n{:<44}{:>9}  {:<16}{:>10}{:>10}",
        "block", "adapters", "ranks", "mean", "max"
    );
    for block in &found.blocks {
        let ranks: Vec<String> = block.ranks.iter().map(ToString::to_string).collect();
        let _ = writeln!(
            text,
            "{:<44}{:>9}  {:<16}{:>10}{:>10}",
            block.block,
            block.modules,
            ranks.join(","),
            norm(block.norms.mean),
            norm(block.norms.max)
        );
    }
    if all {
        text.push('\n');
        for module in found.modules.iter().take(LISTED) {
            let [out, columns] = module.shape;
            let rank = module
                .rank
                .map_or_else(|| "-".to_owned(), |rank| rank.to_string());
            let _ = writeln!(
                text,
                "{:<90}{out:>6} × {columns:<6} rank {rank:<5}{:>12}",
                module.name,
                norm(module.norm)
            );
        }
    }
    if !found.metadata.is_empty() {
        text.push('\n');
        for (key, value) in &found.metadata {
            let shown: String = value.chars().take(100).collect();
            let more = if shown.len() < value.len() { "…" } else { "" };
            let _ = writeln!(text, "{key:<36}{shown}{more}");
        }
    }
    for problem in &found.problems {
        let _ = writeln!(text, "PROBLEM: {problem}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strengths_follow_a_colon() {
        let parse = |text: &str| text.parse::<WeightedFile>().expect("always");
        assert_eq!(parse("a.safetensors:0.8").strength, 0.8);
        assert_eq!(parse("a.safetensors:-1").strength, -1.0);
        let plain = parse("C:\\a.safetensors");
        assert_eq!(
            (plain.path, plain.strength),
            (PathBuf::from("C:\\a.safetensors"), 1.0)
        );
    }
}
