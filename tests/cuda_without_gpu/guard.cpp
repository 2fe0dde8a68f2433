// A build of torch without CUDA has no guard for tensors on CUDA, so that x[1:] of a fake one raises; so with XPU. These
// do nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>

template <c10::DeviceType type>
struct Guard final : c10::impl::NoOpDeviceGuardImpl<type> {
  c10::Device exchangeDevice(c10::Device) const override { return c10::Device(type, 0); }
  c10::Device getDevice() const override { return c10::Device(type, 0); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
static c10::impl::DeviceGuardImplRegistrar cuda(c10::DeviceType::CUDA, new Guard<c10::DeviceType::CUDA>());
static c10::impl::DeviceGuardImplRegistrar xpu(c10::DeviceType::XPU, new Guard<c10::DeviceType::XPU>());
