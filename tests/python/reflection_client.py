"""A foreign client: drives the coordinator with nothing but gRPC server reflection, no .proto file and no
generated code. Prints one JSON object with what it saw.

    scripts/python.sh tests/python/reflection_client.py HOST:PORT JOB_AS_JSON
"""

import json
import sys

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

DEADLINE_S = 30


class Client:
    """Calls methods by name, with messages as JSON-like dictionaries."""

    def __init__(self, address):
        self.channel = grpc.insecure_channel(address)
        grpc.channel_ready_future(self.channel).result(timeout=DEADLINE_S)
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = DescriptorPool(self.database)

    def call(self, service, method, request):
        descriptor = self.pool.FindServiceByName(service).FindMethodByName(method)
        request_class = message_factory.GetMessageClass(descriptor.input_type)
        answer_class = message_factory.GetMessageClass(descriptor.output_type)
        kind = self.channel.unary_stream if descriptor.server_streaming else self.channel.unary_unary
        call = kind(
            f"/{service}/{method}",
            request_serializer=request_class.SerializeToString,
            response_deserializer=answer_class.FromString,
        )
        return call(json_format.ParseDict(request, request_class()), timeout=DEADLINE_S)


def main():
    address, job = sys.argv[1], json.loads(sys.argv[2])
    client = Client(address)
    seen = {"services": sorted(client.database.get_services())}

    health = client.call("grpc.health.v1.Health", "Check", {"service": ""})
    seen["health"] = json_format.MessageToDict(health)

    try:
        client.call("arcface.v1.JobService", "SubmitJob", {"spec": {"output": "x"}})
    except grpc.RpcError as error:
        seen["refused"] = {"code": error.code().name, "details": error.details()}

    submitted = client.call("arcface.v1.JobService", "SubmitJob", {"requestId": "from-python", "spec": job})
    seen["job_id"] = submitted.job.id
    events = client.call("arcface.v1.JobService", "WatchJob", {"jobId": submitted.job.id})
    seen["first_event"] = next(iter(events)).WhichOneof("event")
    events.cancel()
    client.call("arcface.v1.JobService", "CancelJob", {"jobId": submitted.job.id, "reason": "seen enough"})
    listed = client.call("arcface.v1.JobService", "ListJobs", {"pageSize": 10})
    seen["jobs"] = [json_format.MessageToDict(job)["id"] for job in listed.jobs]
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
