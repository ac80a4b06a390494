//! `arcface.v1.ClusterService`.

use super::{page, status};
use crate::control::Handle;
use arcface_proto::v1::{
    DrainNodeRequest, DrainNodeResponse, GetClusterRequest, GetClusterResponse, ListNodesRequest,
    ListNodesResponse, cluster_service_server::ClusterService,
};
use tonic::{Request, Response, Status};

/// Nodes of a page if the client does not say.
const DEFAULT_PAGE: usize = 1000;

/// The service.
pub struct ClusterApi {
    /// The control task.
    pub control: Handle,
}

#[tonic::async_trait]
impl ClusterService for ClusterApi {
    async fn list_nodes(
        &self,
        request: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size, DEFAULT_PAGE)?;
        let mut nodes = self.control.nodes().await.map_err(status::from_control)?;
        // The token is the last id of the page: nodes come and go between pages, ids keep their order.
        nodes.retain(|node| request.page_token.is_empty() || node.id > request.page_token);
        let more = nodes.len() > size;
        nodes.truncate(size);
        let next_page_token = match nodes.last() {
            Some(last) if more => last.id.clone(),
            _ => String::new(),
        };
        Ok(Response::new(ListNodesResponse {
            nodes,
            next_page_token,
        }))
    }

    async fn drain_node(
        &self,
        request: Request<DrainNodeRequest>,
    ) -> Result<Response<DrainNodeResponse>, Status> {
        let DrainNodeRequest { node_id, undo } = request.into_inner();
        let node = node_id
            .parse()
            .map_err(|error: arcface_proto::types::InvalidId| {
                status::invalid("node_id", error.to_string())
            })?;
        let node = self
            .control
            .drain(node, !undo)
            .await
            .map_err(status::from_control)?;
        Ok(Response::new(DrainNodeResponse { node: Some(node) }))
    }

    async fn get_cluster(
        &self,
        _: Request<GetClusterRequest>,
    ) -> Result<Response<GetClusterResponse>, Status> {
        Ok(Response::new(
            self.control.cluster().await.map_err(status::from_control)?,
        ))
    }
}
