//! The OpenAPI 3.1 document: what the routes say of themselves, plus what holds for all of them.

use actix_web::http::Method;
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Info, OpenApi, Tag};
use utoipa_actix_web::AppExt as _;

use super::{openapi_links, openapi_schemas, openapi_shared};

/// Tags in the order of a first visit.
const TAGS: [(&str, &str); 9] = [
    ("models", "Base models found in the model folder"),
    (
        "datasets",
        "Named sets of subsets; a subset is a concept or its regularization",
    ),
    ("images", "Images and their captions"),
    (
        "captions",
        "Many captions at once, their tags, and how they have changed",
    ),
    (
        "runs",
        "Training runs: settings, state, events, metrics and samples",
    ),
    ("loras", "Trained LoRA files"),
    (
        "plugins",
        "Optimizers and learning rate schedulers, and the plugins that bring them",
    ),
    (
        "webhooks",
        "Messages to other services when something happens",
    ),
    ("operations", "Health, version, devices"),
];

/// The document of the whole API.
pub fn openapi() -> OpenApi {
    let (_, document) = actix_web::App::new()
        .into_utoipa_app()
        .configure(super::configure)
        .split_for_parts();
    finish(document)
}

fn finish(mut document: OpenApi) -> OpenApi {
    let mut info = Info::new("lorasmith", env!("CARGO_PKG_VERSION"));
    info.description = Some(
        "Trains LoRA adapters for Stable Diffusion.\n\nErrors are `application/problem+json` with a stable `code`; lists are pages \
         with `next_cursor`; PATCH is a JSON merge-patch with `ETag` and `If-Match`. Every answer has `x-request-id`."
            .to_owned(),
    );
    document.info = info;
    document.tags = Some(
        TAGS.iter()
            .map(|(name, description)| {
                let mut tag = Tag::new(*name);
                tag.description = Some((*description).to_owned());
                tag
            })
            .collect(),
    );
    let bearer = SecurityScheme::Http(
        HttpBuilder::new()
            .scheme(HttpAuthScheme::Bearer)
            .bearer_format("lorasmith_…")
            .description(Some(
                "A key that `lorasmith keys create` has made. Needed when others can reach the service or when there are keys. \
                 Scopes: `read`; `write`, which includes it; `admin`, which includes both.",
            ))
            .build(),
    );
    document
        .components
        .get_or_insert_default()
        .add_security_scheme("api_key", bearer);
    for item in document.paths.paths.values_mut() {
        name_head(item);
    }
    openapi_schemas::name_types(&mut document);
    openapi_links::link(&mut document);
    openapi_shared::complete(&mut document);
    document
}

/// One handler that answers GET and HEAD is one operation to utoipa; operation ids have to differ.
fn name_head(item: &mut PathItem) {
    if item.get.is_some()
        && let Some(head) = &mut item.head
        && let Some(id) = &mut head.operation_id
    {
        *id = format!("head_{}", id.trim_start_matches("get_"));
    }
}

/// Which methods a path knows: the web framework answers 404 where 405 is meant, as each route is on its own.
#[derive(Clone, Debug)]
pub struct RouteTable(Vec<(Vec<Option<String>>, Vec<Method>)>);

impl RouteTable {
    pub fn new(document: &OpenApi) -> Self {
        let route = |(path, item): (&String, &PathItem)| (template(path), methods(item));
        Self(document.paths.paths.iter().map(route).collect())
    }

    /// The methods of the resource at `path`; none when there is no such resource.
    pub fn methods(&self, path: &str) -> Vec<Method> {
        let parts: Vec<&str> = path.split('/').collect();
        let matches = |template: &[Option<String>]| {
            template.len() == parts.len()
                && template.iter().zip(&parts).all(|(want, part)| match want {
                    Some(want) => want == part,
                    None => !part.is_empty(),
                })
        };
        let mut methods: Vec<Method> = self
            .0
            .iter()
            .filter(|(template, _)| matches(template))
            .flat_map(|(_, methods)| methods.clone())
            .collect();
        methods.sort_by(|a, b| a.as_str().cmp(b.as_str()));
        methods.dedup();
        methods
    }
}

/// `None` stands for a parameter.
fn template(path: &str) -> Vec<Option<String>> {
    path.split('/')
        .map(|part| (!part.starts_with('{')).then(|| part.to_owned()))
        .collect()
}

fn methods(item: &PathItem) -> Vec<Method> {
    operations(item)
        .into_iter()
        .map(|(method, _)| method)
        .collect()
}

/// The operations of a path.
pub fn operations(item: &PathItem) -> Vec<(Method, &Operation)> {
    [
        (Method::GET, &item.get),
        (Method::HEAD, &item.head),
        (Method::POST, &item.post),
        (Method::PUT, &item.put),
        (Method::PATCH, &item.patch),
        (Method::DELETE, &item.delete),
    ]
    .into_iter()
    .filter_map(|(method, operation)| Some((method, operation.as_ref()?)))
    .collect()
}

/// The same, to be completed.
pub fn operations_mut(item: &mut PathItem) -> Vec<(Method, &mut Operation)> {
    [
        (Method::GET, &mut item.get),
        (Method::HEAD, &mut item.head),
        (Method::POST, &mut item.post),
        (Method::PUT, &mut item.put),
        (Method::PATCH, &mut item.patch),
        (Method::DELETE, &mut item.delete),
    ]
    .into_iter()
    .filter_map(|(method, operation)| Some((method, operation.as_mut()?)))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_operation_is_described() {
        let document = openapi();
        let tags: HashSet<&str> = TAGS.iter().map(|(name, _)| *name).collect();
        let mut ids = HashSet::new();
        for (path, item) in &document.paths.paths {
            for (method, operation) in operations(item) {
                let place = format!("{method} {path}");
                let id = operation.operation_id.clone().unwrap_or_default();
                assert!(
                    id.contains('_') && ids.insert(id.clone()),
                    "{place}: operation id `{id}`"
                );
                assert!(
                    operation
                        .summary
                        .as_ref()
                        .is_some_and(|text| !text.is_empty()),
                    "{place}: summary"
                );
                assert!(
                    operation
                        .description
                        .as_ref()
                        .is_some_and(|text| !text.is_empty()),
                    "{place}: description"
                );
                let tagged = operation
                    .tags
                    .as_ref()
                    .is_some_and(|list| list.iter().all(|tag| tags.contains(tag.as_str())));
                assert!(tagged, "{place}: tag");
                let good = operation
                    .responses
                    .responses
                    .keys()
                    .any(|status| status.starts_with('2'));
                assert!(good, "{place}: a good answer");
            }
        }
        assert!(!ids.is_empty());
    }

    #[test]
    fn the_route_table_tells_methods() {
        let table = RouteTable::new(&openapi());
        assert!(table.methods("/v1/datasets").contains(&Method::POST));
        assert!(table.methods("/v1/nothing").is_empty());
        assert!(table.methods("/v1/datasets/").is_empty());
    }
}
