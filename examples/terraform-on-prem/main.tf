# Meters a service of a Kong with a database, over its Admin API.
#
#     export TF_VAR_admin_uri=http://localhost:8001
#     terraform init && terraform apply
#
# The token is a vault reference, which is all that state files and plans ever hold of it. OpenTofu takes the same file.
terraform {
  required_providers {
    kong = {
      source  = "kevholditch/kong"
      version = "~> 6.5"
    }
  }
}

variable "admin_uri" {
  description = "URL of Kong's Admin API."
  type        = string
  default     = "http://localhost:8001"
}

variable "ingest_endpoint" {
  description = "Where events are posted to."
  type        = string
  default     = "https://us.api.konghq.com/v3/openmeter/events"
}

variable "api_token" {
  description = "Token for it, or a vault reference that Kong resolves."
  type        = string
  default     = "{vault://env/om-token}"
  sensitive   = true
}

variable "subject_header" {
  description = "Request header that names who is billed."
  type        = string
  default     = "x-tenant-id"
}

variable "upstream" {
  description = "Host and port of the service."
  type        = object({ host = string, port = number })
  default     = { host = "orders.internal", port = 80 }
}

provider "kong" {
  kong_admin_uri = var.admin_uri
}

resource "kong_service" "orders" {
  name     = "orders"
  protocol = "http"
  host     = var.upstream.host
  port     = var.upstream.port
}

resource "kong_route" "orders" {
  name       = "orders"
  protocols  = ["http", "https"]
  paths      = ["/orders"]
  service_id = kong_service.orders.id
}

# Without `service_id` it is global; `route_id` and `consumer_id` are the other scopes.
resource "kong_plugin" "metering" {
  name       = "metering-and-billing"
  service_id = kong_service.orders.id
  config_json = jsonencode({
    ingest_endpoint      = var.ingest_endpoint
    api_token            = var.api_token
    meter_api_requests   = true
    meter_ai_token_usage = false
    subject = {
      look_up_value_in = "header"
      field            = var.subject_header
    }
    queue = {
      max_batch_size = 100
    }
  })
}
