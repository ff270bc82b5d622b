//! The REST API: the only module that knows HTTP. One file per resource; the rules are in `openapi/CONVENTIONS.md`.

pub mod codes;
pub mod decode;
pub mod extract;
pub mod middleware;
pub mod page;
pub mod patch;
pub mod problem;

pub use codes::Code;
pub use extract::{Json, Query};
pub use page::{Page, PageQuery, PageRequest};
pub use patch::{MergePatch, check_if_match, etag};
pub use problem::{FieldError, Problem, ProblemBody};
